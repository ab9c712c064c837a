"""A value head dim other than the query's, such as DeepSeek's 192 and 128: forward and backward
against fp32, and the output."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from calls import deterministic, flash_forward, run_flash, run_sdpa_op, sdpa_forward
from cases import (
    DTYPES,
    HEADS,
    MASKS,
    NASTY_LENGTHS,
    UNEQUAL_HEAD_DIMS,
    Problem,
    dense,
    make_inputs,
    varlen,
)
from compare import assert_close, assert_matches_reference
from profiling import providers_of
from reference import Result, compute
from test_layouts import BATCH, DIM, LAYOUTS, SEQLEN, permuted
from test_layouts import HEADS as HEADS_DIM

pytestmark = pytest.mark.usefixtures("strict")

DEEPSEEK = {"head_dim": 192, "head_dim_v": 128}
ORDERS = ("atomic", "deterministic")
MATRIX = list(product(DTYPES, MASKS, ("dense", "varlen"), HEADS, ORDERS))
PAIRS = [(s, s) for s in NASTY_LENGTHS] + [
    (1, 239),
    (239, 1),
    (63, 65),
    (64, 96),
    (127, 129),
    (799, 239),
    (127, 4224),
    (4224, 127),
]


def fields_of(heads: str, mask: str, **rest) -> dict:
    return dict(heads=HEADS[heads][0], heads_kv=HEADS[heads][1], **MASKS[mask], **rest)


def check(problem: Problem, run=run_flash, *, in_order: bool = False) -> None:
    inputs = make_inputs(problem)
    with deterministic(in_order):
        result = run(problem, inputs, backward=True)
    assert {t.dtype for t in (result.out, result.dq, result.dk, result.dv)} == {problem.dtype}
    assert_matches_reference(problem, inputs, result)


@pytest.mark.parametrize(
    ("dtype", "mask", "layout", "heads", "order"), MATRIX, ids=["-".join(row) for row in MATRIX]
)
def test_matrix(dtype, mask, layout, heads, order):
    fields = fields_of(heads, mask, dtype=DTYPES[dtype], **DEEPSEEK)
    # There are more than 512 queries: with fewer, so few heads are decoded.
    problem = (
        dense(577, 461, **fields)
        if layout == "dense"
        else varlen((129, 1, 577, 64), (129, 77, 200, 500), **fields)
    )
    check(problem, in_order=order == "deterministic")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), PAIRS, ids=[f"q{q}k{k}" for q, k in PAIRS])
def test_lengths(seqlen_q, seqlen_k, mask):
    dtype = torch.bfloat16 if seqlen_k % 4 else torch.float16
    batch = 1 if max(seqlen_q, seqlen_k) > 2000 else 3
    heads_kv = 1 if seqlen_k % 3 else 2
    problem = dense(
        seqlen_q,
        seqlen_k,
        batch=batch,
        heads=2,
        heads_kv=heads_kv,
        dtype=dtype,
        **DEEPSEEK,
        **MASKS[mask],
    )
    check(problem, in_order=bool(seqlen_q % 2))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", ("mha", "gqa"))
@pytest.mark.parametrize("lengths", ("equal", "different", "empty"))
def test_varlen_lengths(lengths, heads, mask, order):
    seqlens = NASTY_LENGTHS[:-1]
    seqlens_q, seqlens_k = {
        "equal": (seqlens, seqlens),
        "different": (seqlens, seqlens[::-1]),
        "empty": ((0, 65, 0, 129, 239, 0, 7), (63, 0, 0, 129, 799, 5, 0)),
    }[lengths]
    check(
        varlen(seqlens_q, seqlens_k, **fields_of(heads, mask, **DEEPSEEK)),
        in_order=order == "deterministic",
    )


@pytest.mark.parametrize("layout", ("dense", "varlen"))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", ("mha", "gqa"))
@pytest.mark.parametrize(("head_dim", "head_dim_v"), UNEQUAL_HEAD_DIMS)
def test_head_dims(head_dim, head_dim_v, heads, mask, layout):
    dtype = torch.bfloat16 if head_dim % 16 else torch.float16
    fields = fields_of(heads, mask, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
    check(
        dense(129, 203, **fields)
        if layout == "dense"
        else varlen((129, 3, 70), (140, 65, 70), **fields)
    )


@pytest.mark.parametrize("scale", (0.01, 0.3))
def test_scale(scale):
    check(dense(129, 129, scale=scale, **DEEPSEEK))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", ("full", "causal"))
def test_scaled_dot_product_op(mask, heads):
    seqlens = (301, 301) if mask == "causal" else (301, 129)
    check(dense(*seqlens, **fields_of(heads, mask, **DEEPSEEK)), run_sdpa_op)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    problem = dense(129, 203, batch=3, heads=4, heads_kv=2, is_causal=True, **DEEPSEEK)
    inputs = make_inputs(problem)
    laid_out = {name: LAYOUTS[layout](getattr(inputs, name)) for name in ("q", "k", "v", "do")}
    inputs = replace(inputs, **laid_out)
    assert_matches_reference(problem, inputs, run_flash(problem, inputs, backward=True))


@pytest.mark.parametrize(
    "order",
    [
        (BATCH, SEQLEN, HEADS_DIM, DIM),
        (BATCH, HEADS_DIM, SEQLEN, DIM),
        (SEQLEN, BATCH, HEADS_DIM, DIM),
    ],
    ids=str,
)
def test_output_has_query_s_order_of_dimensions(order):
    """Torch 2.15 has a rule for an output of another shape than query's: it is dense, with the
    dimensions as query has them in memory."""
    problem = dense(129, 203, batch=3, **DEEPSEEK)
    inputs = make_inputs(problem)
    out = flash_forward(problem, replace(inputs, q=permuted(*order)(inputs.q)))[0]
    assert out.shape == (3, 129, 4, 128)
    assert out.permute(order).is_contiguous(), (
        f"strides {out.stride()}, expected dense in the order {order}"
    )


def test_output_of_the_sdpa_op():
    problem = dense(129, 203, **DEEPSEEK)
    out, lse = sdpa_forward(problem, make_inputs(problem))[:2]
    assert out.shape == (2, 4, 129, 128) and out.transpose(1, 2).is_contiguous(), (
        f"{tuple(out.shape)}, strides {out.stride()}"
    )
    assert lse.shape == (2, 4, 129)


@pytest.mark.parametrize("layout", ("dense", "varlen"))
def test_autograd(layout):
    """The call goes through the op's own autograd formula, which hands our output and its gradient
    back to us."""
    fields = dict(is_causal=True, **DEEPSEEK)
    problem = dense(239, 239, **fields) if layout == "dense" else varlen((129, 1, 330), **fields)
    inputs = make_inputs(problem)
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out, lse = flash_forward(problem, replace(inputs, q=leaves[0], k=leaves[1], v=leaves[2]))[:2]
    gradients = torch.autograd.grad(out, leaves, inputs.do)
    assert_matches_reference(problem, inputs, Result(out.detach(), lse.detach(), *gradients))


def test_varlen_attn():
    from torch.nn.attention.varlen import varlen_attn

    problem = varlen((129, 1, 330), **DEEPSEEK)
    inputs = make_inputs(problem)
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    lengths = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, 330, 330)
    # It makes a random state of its own.
    assert providers_of(lambda: varlen_attn(*leaves, *lengths)) - {"other"} == {"ours"}
    out = varlen_attn(*leaves, *lengths)
    gradients = torch.autograd.grad(out, leaves, inputs.do)
    assert_matches_reference(
        problem, inputs, Result(out.detach(), None, *gradients), check_lse=False
    )


@pytest.mark.parametrize("head_dims", [(192, 128), (160, 96)], ids=str)
def test_rows_beside_the_value_are_not_read_or_written(head_dims):
    """Value is a slice of a wider tensor, as one projection of keys and values makes it; what lies
    beside it is NaN."""
    problem = varlen(
        (129, 3, 70), (140, 65, 70), head_dim=head_dims[0], head_dim_v=head_dims[1], is_causal=True
    )
    inputs = make_inputs(problem)
    wide = torch.full(
        (*inputs.v.shape[:-1], 256), float("nan"), dtype=problem.dtype, device=inputs.v.device
    )
    value = wide[..., : head_dims[1]]
    value.copy_(inputs.v)
    inputs = replace(inputs, v=value)
    assert_matches_reference(problem, inputs, run_flash(problem, inputs, backward=True))
    assert wide[..., head_dims[1] :].isnan().all()


def test_softmax_scale_is_of_the_query_s_head_dim():
    problem = dense(129, 203, **DEEPSEEK)
    inputs = make_inputs(problem)
    default, explicit = (
        flash_forward(replace(problem, scale=scale), inputs)[0] for scale in (None, 192**-0.5)
    )
    assert torch.equal(default, explicit)
    truth, plain = (
        compute(problem, inputs, dtype, backward=False) for dtype in (torch.float32, problem.dtype)
    )
    assert_close("out", default, plain.out, truth.out)


@pytest.mark.parametrize(
    ("head_dims", "reason"),
    [
        ((192, 100), "value's head_dim must be a multiple of 8, is 100"),
        ((64, 264), "value's head_dim must be at most"),
    ],
    ids=str,
)
def test_head_dims_that_no_kernel_takes_are_refused_with_the_reason(head_dims, reason):
    problem = dense(129, 203, head_dim=head_dims[0], head_dim_v=head_dims[1])
    with pytest.raises(RuntimeError, match=f"FA4 _flash_attention_forward unsupported: {reason}"):
        flash_forward(problem, make_inputs(problem))


def test_query_expanded_over_the_batch_is_refused():
    """The promised output has the batch innermost then, where the kernels need the head dim."""
    problem = dense(129, 203, **DEEPSEEK)
    inputs = make_inputs(problem)
    with pytest.raises(RuntimeError, match="query must not overlap itself"):
        flash_forward(problem, replace(inputs, q=inputs.q[:1].expand_as(inputs.q)))
