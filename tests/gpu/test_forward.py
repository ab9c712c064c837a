"""The forward against fp32: every row of the matrix, every bucketed head dim, and the lengths that
break kernels."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from calls import flash_forward, planned, run_autograd, run_flash, run_sdpa_op
from cases import (
    DTYPES,
    HEAD_DIMS,
    HEADS,
    MASKS,
    NASTY_LENGTHS,
    Problem,
    dense,
    make_inputs,
    varlen,
)
from compare import assert_lse, assert_matches_reference
from reference import compute

from fa4_ext import _library

pytestmark = pytest.mark.usefixtures("strict")

MATRIX = list(product(DTYPES, HEAD_DIMS, MASKS, ("dense", "varlen"), HEADS))
PAIRS = [(s, s) for s in NASTY_LENGTHS] + [
    (1, 239), (239, 1), (2, 3), (3, 2), (1, 4224), (4224, 1), (63, 65), (65, 63), (64, 64),
    (127, 129), (129, 127), (128, 128),
    (192, 384), (239, 799), (799, 239), (127, 4224), (4224, 127), (1023, 799),
]  # fmt: skip
ODD_HEAD_DIMS = (8, 16, 24, 40, 72, 80, 104, 120, 136, 160, 200, 232)


def check(problem: Problem, run=run_flash, *, decoded: bool = True, **options) -> None:
    """Runs a call and compares it. With `decoded`, few queries may be decoded, as the planner says;
    test_decode.py is for these."""
    inputs = make_inputs(problem)
    with _library.override(decode=0 if decoded else -1):
        assert decoded or planned(problem, inputs) == "forward"
        result = run(problem, inputs, backward=False)
    assert result.out.dtype == problem.dtype
    assert_matches_reference(problem, inputs, result, **options)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "mask", "layout", "heads"),
    MATRIX,
    ids=["-".join(map(str, row)) for row in MATRIX],
)
def test_matrix(dtype, head_dim, mask, layout, heads):
    fields = dict(
        dtype=DTYPES[dtype],
        head_dim=head_dim,
        heads=HEADS[heads][0],
        heads_kv=HEADS[heads][1],
        **MASKS[mask],
    )
    problem = (
        dense(577, 461, **fields)
        if layout == "dense"
        else varlen((129, 1, 577, 64), (129, 77, 200, 500), **fields)
    )
    check(problem, decoded=False)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), PAIRS, ids=[f"q{q}k{k}" for q, k in PAIRS])
def test_lengths(seqlen_q, seqlen_k, mask, head_dim):
    dtype = torch.bfloat16 if (seqlen_q + seqlen_k + head_dim) % 4 else torch.float16
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
    check(problem, decoded=False)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", ("equal", "different", "empty", "single", "all_empty_keys"))
def test_varlen_lengths(lengths, mask, head_dim):
    seqlens = NASTY_LENGTHS[:-1]
    seqlens_q, seqlens_k = {
        "equal": (seqlens, seqlens),
        "different": (seqlens, seqlens[::-1]),
        "empty": ((0, 65, 0, 129, 239, 0, 7), (63, 0, 0, 129, 799, 5, 0)),
        "single": ((4224,), (1023,)),
        "all_empty_keys": ((65, 129), (0, 3)),
    }[lengths]
    check(
        varlen(seqlens_q, seqlens_k, heads=40, heads_kv=20, head_dim=head_dim, **MASKS[mask]),
        decoded=False,
    )


@pytest.mark.parametrize("layout", ("dense", "varlen"))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", ODD_HEAD_DIMS)
def test_head_dims(head_dim, mask, layout):
    dtype = torch.float16 if head_dim % 16 else torch.bfloat16
    fields = dict(head_dim=head_dim, dtype=dtype, heads=72, heads_kv=36, **MASKS[mask])
    check(
        dense(129, 203, **fields)
        if layout == "dense"
        else varlen((129, 3, 70), (140, 65, 70), **fields),
        decoded=False,
    )


@pytest.mark.parametrize("layout", ("dense", "varlen"))
@pytest.mark.parametrize(
    ("heads", "heads_kv"),
    [(r * 2, 2) for r in range(1, 9)] + [(7, 1), (16, 1), (32, 1), (1, 1), (5, 5)],
)
def test_head_ratios(heads, heads_kv, layout):
    fields = dict(heads=heads, heads_kv=heads_kv, head_dim=64, is_causal=True)
    check(
        dense(131, 131, **fields) if layout == "dense" else varlen((67, 131), (67, 190), **fields)
    )


WINDOWS = [
    (0, 0),
    (1, 0),
    (0, 1),
    (5, -1),
    (-1, 5),
    (64, 64),
    (127, 0),
    (128, 128),
    (1000, 3),
    (5000, 5000),
]


@pytest.mark.parametrize("seqlens", [(239, 239), (130, 799), (799, 130)], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window, seqlens):
    check(dense(*seqlens, heads=40, heads_kv=40, head_dim=64, window=window), decoded=False)
    check(
        varlen(
            (seqlens[0], 65), (seqlens[1], 65), heads=40, heads_kv=40, head_dim=128, window=window
        ),
        decoded=False,
    )


@pytest.mark.parametrize("window", [(17, -1), (17, 0), (17, 9), (-1, 9)], ids=str)
def test_causal_narrows_the_window(window):
    """With is_causal and a window, the right bound is 0 whatever was asked, and the left one
    stays."""
    check(dense(239, 301, heads=2, heads_kv=2, window=window, is_causal=True))


def test_a_bound_of_the_whole_length_is_none():
    """In stock's kernel a right bound of at least seqlen_k masks nothing, which matters with more
    queries than keys."""
    problem = dense(799, 130, heads=2, heads_kv=2)
    inputs = make_inputs(problem)
    assert torch.equal(
        flash_forward(problem, inputs)[0], flash_forward(problem, inputs, window_size_right=130)[0]
    )


@pytest.mark.parametrize("scale", (0.01, 0.3, 1.0, 2.5))
@pytest.mark.parametrize("mask", MASKS)
def test_scale(scale, mask):
    check(dense(129, 129, head_dim=64, scale=scale, **MASKS[mask]))


def test_minus_one_is_no_window():
    problem = dense(129, 203)
    inputs = make_inputs(problem)
    absent = flash_forward(problem, inputs)
    minus_one = flash_forward(problem, inputs, window_size_left=-1, window_size_right=-1)
    assert torch.equal(absent[0], minus_one[0]) and torch.equal(absent[1], minus_one[1])


def test_dense_lengths_come_from_shapes():
    """Context parallel passes the max_q and max_k of the unsplit tensors: they are not the
    lengths."""
    problem = dense(129, 203, is_causal=True)
    inputs = make_inputs(problem)
    wrong = torch.ops.aten._flash_attention_forward(
        inputs.q, inputs.k, inputs.v, None, None, 999, 7, 0.0, True, False
    )
    right = flash_forward(problem, inputs)
    assert torch.equal(wrong[0], right[0]) and torch.equal(wrong[1], right[1])


def test_large_values():
    """The online softmax rescales rows whose maximum grows by hundreds from tile to tile."""
    problem = dense(239, 799, heads=2, heads_kv=2)
    inputs = make_inputs(problem)
    inputs.k.mul_(
        torch.linspace(0.1, 30, 799, device=inputs.k.device, dtype=problem.dtype)[:, None, None]
    )
    assert_matches_reference(problem, inputs, run_flash(problem, inputs, backward=False))


def test_nan_stays_in_its_row():
    """A NaN query spoils its own row and nothing else."""
    problem = dense(239, 239, heads=2, heads_kv=2)
    inputs = make_inputs(problem)
    inputs.q[1, 100, 1, 5] = float("nan")
    out, lse = flash_forward(problem, inputs)[:2]
    assert out[1, 100, 1].isnan().all()
    out[1, 100, 1], lse[1, 1, 100] = 0, 0
    assert not out.isnan().any() and not lse.isnan().any()


@pytest.mark.parametrize("mask", ("full", "causal"))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", (20, *HEAD_DIMS))
@pytest.mark.parametrize("run", (run_sdpa_op, run_autograd), ids=("aten", "functional"))
def test_scaled_dot_product_attention(run, head_dim, heads, mask):
    """F.sdpa pads head dim 20 to 24 before it calls the op, which itself is never asked for 20."""
    head_dim = 24 if run is run_sdpa_op and head_dim == 20 else head_dim
    seqlens = (301, 301) if mask == "causal" or run is run_autograd else (301, 129)
    problem = dense(
        *seqlens, head_dim=head_dim, heads=HEADS[heads][0], heads_kv=HEADS[heads][1], **MASKS[mask]
    )
    check(problem, run, check_lse=run is run_sdpa_op)


def test_lse_is_exact_enough_to_merge():
    """Context parallel merges halves by their lse: out and lse of the halves give the whole."""
    problem = dense(129, 512, heads=2, heads_kv=2)
    inputs = make_inputs(problem)
    half = dense(129, 256, heads=2, heads_kv=2)
    parts = []
    for keys in (slice(0, 256), slice(256, 512)):
        part = replace(inputs, k=inputs.k[:, keys], v=inputs.v[:, keys])
        parts.append(flash_forward(half, part)[:2])
    (out_a, lse_a), (out_b, lse_b) = parts
    lse = torch.logaddexp(lse_a, lse_b)
    weights = [(part - lse).exp().transpose(1, 2)[..., None] for part in (lse_a, lse_b)]
    merged = weights[0] * out_a.float() + weights[1] * out_b.float()
    truth = compute(problem, inputs, torch.float32, backward=False)
    assert_lse(lse, truth.lse)
    torch.testing.assert_close(merged, truth.out, atol=2e-2, rtol=2e-2)
