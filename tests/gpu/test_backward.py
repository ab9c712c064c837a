"""The backward against fp32: every row of the matrix with and without determinism, every head dim,
nasty lengths, both ways in."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from calls import deterministic, flash_backward, flash_forward, run_autograd, run_flash, run_sdpa_op
from cases import (
    BLACKWELL,
    DTYPES,
    HEAD_DIMS,
    HEADS,
    MASKS,
    NASTY_LENGTHS,
    Problem,
    dense,
    make_inputs,
    poison,
    varlen,
)
from compare import assert_matches_reference
from groups import groups_alone
from test_forward import ODD_HEAD_DIMS, PAIRS, WINDOWS

pytestmark = pytest.mark.usefixtures("strict")

MATRIX = list(
    product(DTYPES, HEAD_DIMS, MASKS, ("dense", "varlen"), HEADS, ("atomic", "deterministic"))
)


def check(problem: Problem, run=run_flash, *, in_order: bool = False, **options) -> None:
    inputs = make_inputs(problem)
    with deterministic(in_order):
        result = run(problem, inputs, backward=True)
    assert {result.dq.dtype, result.dk.dtype, result.dv.dtype} == {problem.dtype}
    assert_matches_reference(problem, inputs, result, **options)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "mask", "layout", "heads", "order"),
    MATRIX,
    ids=["-".join(map(str, row)) for row in MATRIX],
)
def test_matrix(dtype, head_dim, mask, layout, heads, order):
    fields = dict(
        dtype=DTYPES[dtype],
        head_dim=head_dim,
        heads=HEADS[heads][0],
        heads_kv=HEADS[heads][1],
        **MASKS[mask],
    )
    problem = (
        dense(239, 461, **fields)
        if layout == "dense"
        else varlen((129, 1, 330, 64), (129, 77, 200, 500), **fields)
    )
    check(problem, in_order=order == "deterministic")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), PAIRS, ids=[f"q{q}k{k}" for q, k in PAIRS])
def test_lengths(seqlen_q, seqlen_k, mask, head_dim):
    dtype = torch.float16 if (seqlen_q + seqlen_k + head_dim) % 4 else torch.bfloat16
    batch = 1 if max(seqlen_q, seqlen_k) > 2000 else 3
    problem = dense(
        seqlen_q,
        seqlen_k,
        batch=batch,
        heads=2,
        heads_kv=2,
        head_dim=head_dim,
        dtype=dtype,
        **MASKS[mask],
    )
    check(problem, in_order=bool(seqlen_q % 2))


@pytest.mark.parametrize("order", ("atomic", "deterministic"))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", ("equal", "different", "empty", "single"))
def test_varlen_lengths(lengths, mask, head_dim, order):
    seqlens = NASTY_LENGTHS[:-1]
    seqlens_q, seqlens_k = {
        "equal": (seqlens, seqlens),
        "different": (seqlens, seqlens[::-1]),
        "empty": ((0, 65, 0, 129, 239, 0, 7), (63, 0, 0, 129, 799, 5, 0)),
        "single": ((4224,), (1023,)),
    }[lengths]
    heads_kv = 2 if lengths == "equal" else 1
    problem = varlen(
        seqlens_q, seqlens_k, heads=2, heads_kv=heads_kv, head_dim=head_dim, **MASKS[mask]
    )
    check(problem, in_order=order == "deterministic")


GROUPS = [
    (dtype, head_dims, mask, *shape)
    for number, (head_dims, mask, shape) in enumerate(
        product(
            ((64, 64), (40, 56), (128, 128), (104, 72)),
            ("full", "causal"),
            # queries, keys, query heads, key/value heads, batch
            ((64, 128, 4, 2, 2), (129, 257, 14, 2, 1), (1, 129, 8, 1, 3), (200, 65, 3, 1, 2),
             (63, 383, 16, 2, 1), (576, 1000, 12, 4, 11)),
        )
    )
    for dtype in (("bf16", "fp16")[number % 2],)
]  # fmt: skip


@pytest.mark.skipif(BLACKWELL, reason="Hopper has a kernel for groups of heads")
@pytest.mark.parametrize(
    ("dtype", "head_dims", "mask", "queries", "keys", "heads", "heads_kv", "batch"), GROUPS
)
def test_groups_of_heads(dtype, head_dims, mask, queries, keys, heads, heads_kv, batch):
    """The kernel that works on groups of heads together, also where another would run: around its
    tiles' ends, of rows without keys, of more key blocks than SMs."""
    head_dim, head_dim_v = head_dims
    problem = dense(
        queries, keys, batch=batch, heads=heads, heads_kv=heads_kv, head_dim=head_dim,
        head_dim_v=head_dim_v, dtype=DTYPES[dtype], **MASKS[mask],
    )  # fmt: skip
    with groups_alone():
        check(problem)


PACKED_GROUPS = [
    (("bf16", "fp16")[number % 2], head_dims, mask, *shape)
    for number, (head_dims, mask, shape) in enumerate(
        product(
            ((64, 64), (40, 56), (128, 128), (104, 72)),
            ("full", "causal"),
            # lengths of queries and of keys, query heads, key/value heads
            (((129, 1, 330, 64), (129, 77, 200, 500), 4, 2),
             ((0, 65, 0, 129, 239, 0, 7), (63, 0, 0, 129, 799, 5, 0), 14, 2),
             ((4224,), (1023,), 8, 1), ((64, 128, 192), (64, 128, 192), 3, 1),
             ((333,) * 9, (129,) * 9, 16, 2), ((17, 700), (1400, 63), 12, 4)),
        )
    )
]  # fmt: skip


@pytest.mark.skipif(BLACKWELL, reason="Hopper has a kernel for groups of heads")
@pytest.mark.parametrize(
    ("dtype", "head_dims", "mask", "queries", "keys", "heads", "heads_kv"), PACKED_GROUPS
)
def test_groups_of_heads_of_packed_sequences(
    dtype, head_dims, mask, queries, keys, heads, heads_kv
):
    head_dim, head_dim_v = head_dims
    problem = varlen(
        queries, keys, heads=heads, heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v,
        dtype=DTYPES[dtype], **MASKS[mask],
    )  # fmt: skip
    with groups_alone():
        check(problem)


@pytest.mark.parametrize("layout", ("dense", "varlen"))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", ("mha", "gqa"))
@pytest.mark.parametrize("head_dim", ODD_HEAD_DIMS)
def test_head_dims(head_dim, heads, mask, layout):
    dtype = torch.bfloat16 if head_dim % 16 else torch.float16
    fields = dict(
        head_dim=head_dim,
        dtype=dtype,
        heads=HEADS[heads][0],
        heads_kv=HEADS[heads][1],
        **MASKS[mask],
    )
    check(
        dense(129, 203, **fields)
        if layout == "dense"
        else varlen((129, 3, 70), (140, 65, 70), **fields)
    )


@pytest.mark.parametrize("order", ("atomic", "deterministic"))
@pytest.mark.parametrize("layout", ("dense", "varlen"))
@pytest.mark.parametrize(
    ("heads", "heads_kv"),
    [(r * 2, 2) for r in range(1, 9)] + [(7, 1), (16, 1), (32, 1), (1, 1), (5, 5)],
)
def test_head_ratios(heads, heads_kv, layout, order):
    fields = dict(heads=heads, heads_kv=heads_kv, head_dim=64, is_causal=True)
    problem = (
        dense(131, 131, **fields) if layout == "dense" else varlen((67, 131), (67, 190), **fields)
    )
    check(problem, in_order=order == "deterministic")


@pytest.mark.parametrize("seqlens", [(239, 239), (130, 799), (799, 130)], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window, seqlens):
    check(dense(*seqlens, heads=2, heads_kv=2, head_dim=64, window=window))
    check(
        varlen((seqlens[0], 65), (seqlens[1], 65), heads=2, heads_kv=1, head_dim=128, window=window)
    )


@pytest.mark.parametrize("scale", (0.01, 0.3, 1.0))
@pytest.mark.parametrize("mask", MASKS)
def test_scale(scale, mask):
    check(dense(129, 129, head_dim=64, scale=scale, **MASKS[mask]))


@pytest.mark.parametrize("mask", ("full", "causal"))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", (20, *HEAD_DIMS))
@pytest.mark.parametrize("run", (run_sdpa_op, run_autograd), ids=("aten", "functional"))
def test_scaled_dot_product_attention(run, head_dim, heads, mask):
    head_dim = 24 if run is run_sdpa_op and head_dim == 20 else head_dim
    seqlens = (301, 301) if mask == "causal" or run is run_autograd else (301, 129)
    problem = dense(
        *seqlens, head_dim=head_dim, heads=HEADS[heads][0], heads_kv=HEADS[heads][1], **MASKS[mask]
    )
    check(problem, run, check_lse=run is run_sdpa_op)


@pytest.mark.parametrize("layout", ("dense", "varlen"))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [*((d, d) for d in HEAD_DIMS), (192, 128)])
def test_deterministic_is_bitwise(head_dim, head_dim_v, mask, heads, layout):
    """The bits are the same in five runs, with other work on the device between them. The
    accumulators start from poisoned memory each time."""
    fields = dict(
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        heads=HEADS[heads][0],
        heads_kv=HEADS[heads][1],
        **MASKS[mask],
    )
    problem = (
        dense(1023, 1023, **fields)
        if layout == "dense"
        else varlen((799, 65, 1023), (1023, 65, 799), **fields)
    )
    inputs = make_inputs(problem)
    with deterministic():
        forward = flash_forward(problem, inputs)
        first = flash_backward(problem, inputs, forward)
        for run in range(4):
            poison(inputs)
            again = flash_backward(problem, inputs, forward)
            for name, a, b in zip(("dq", "dk", "dv"), first, again, strict=True):
                assert torch.equal(a, b), (
                    f"{name} of run {run + 2} differs from run 1 at {int((a != b).sum())} of "
                    f"{a.numel()}"
                )


@pytest.mark.parametrize(
    ("tokens", "batch", "runs"),
    [(1023, 2, 4), (1500, 30, 20)],
    ids=["a_tile_a_block", "many_tiles_a_block"],
)
def test_forward_is_bitwise(tokens, batch, runs):
    problem = dense(tokens, tokens, batch=batch, is_causal=True)
    inputs = make_inputs(problem)
    first = flash_forward(problem, inputs)[:2]
    for _ in range(runs):
        poison(inputs)
        again = flash_forward(problem, inputs)[:2]
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
