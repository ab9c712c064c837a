"""Calls without queries, without keys, without a batch: no kernel is launched, and the answer is an
empty tensor or zeros."""

from __future__ import annotations

import pytest
import torch
from calls import TORCH_2_12, flash_forward_into, run_flash, run_sdpa_op
from cases import Inputs, Problem, cumulative, make_inputs
from compare import assert_matches_reference
from reference import Result

import fa4_ext

# The columns are batch, rows of queries and of keys, heads, and heads of keys.
DENSE = {
    "no_queries": (2, 0, 65, 4, 2),
    "no_keys": (2, 65, 0, 4, 2),
    "neither": (2, 0, 0, 4, 4),
    "no_batch": (0, 65, 65, 4, 2),
    "no_heads": (2, 65, 65, 0, 0),
}
# Lengths of queries and of keys.
PACKED = {
    "no_queries": ((0, 0), (65, 7)),
    "no_keys": ((65, 7), (0, 0)),
    "neither": ((0, 0), (0, 0)),
    "no_sequences": ((), ()),
}


def dense_inputs(case: str) -> tuple[Problem, Inputs]:
    batch, rows, keys, heads, heads_kv = DENSE[case]
    q, do = (
        torch.randn(batch, rows, heads, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    k, v = (
        torch.randn(batch, keys, heads_kv, 64, dtype=torch.bfloat16, device="cuda")
        for _ in range(2)
    )
    return Problem(seqlens_q=(rows,), seqlens_k=(keys,), is_causal=True), Inputs(q, k, v, do)


def packed_inputs(case: str) -> tuple[Problem, Inputs]:
    queries, keys = PACKED[case]
    q, do = (
        torch.randn(sum(queries), 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    k, v = (torch.randn(sum(keys), 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    problem = Problem(seqlens_q=queries or (0,), seqlens_k=keys or (0,), varlen=True)
    return problem, Inputs(q, k, v, do, cumulative(queries), cumulative(keys))


def check(x: Inputs, out, lse, gradients) -> None:
    assert out.shape == x.q.shape and not out.any(), (
        f"out: {out.shape}, {int((out != 0).sum())} elements are not 0"
    )
    assert lse.isneginf().all(), (
        f"lse: {int((~lse.isneginf()).sum())} of {lse.numel()} elements are not -inf"
    )
    for name, gradient, tensor in zip(("dq", "dk", "dv"), gradients, (x.q, x.k, x.v), strict=True):
        assert gradient.shape == tensor.shape, f"{name}: {gradient.shape}, expected {tensor.shape}"
        assert not gradient.any(), f"{name}: {int((gradient != 0).sum())} elements are not 0"


@pytest.mark.parametrize("speed_rules", (False, True))
@pytest.mark.parametrize(
    ("layout", "case"), [("dense", case) for case in DENSE] + [("packed", case) for case in PACKED]
)
def test_low_level_op(layout, case, speed_rules):
    problem, x = (dense_inputs if layout == "dense" else packed_inputs)(case)
    with fa4_ext.register(fallback="error", speed_rules=speed_rules):
        result = run_flash(problem, x, backward=True)
    check(x, result.out, result.lse, (result.dq, result.dk, result.dv))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("case", DENSE)
def test_sdpa_op(case):
    problem, x = dense_inputs(case)
    result = run_sdpa_op(problem, x, backward=True)
    check(x, result.out, result.lse, (result.dq, result.dk, result.dv))


@pytest.mark.usefixtures("strict")
@pytest.mark.skipif(not TORCH_2_12, reason="torch 2.12 has the op")
@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("beside", [0, 3])  # columns; with 3 the result goes in by way of a copy
def test_in_place(case, beside):
    problem, x = packed_inputs(case)
    rows, columns = x.q.shape[:-1], x.q.shape[-1]
    out = x.q.new_full((*rows, columns + beside), float("nan"))[..., :columns]
    lse = flash_forward_into(out, problem, x)
    assert not out.any() and lse.isneginf().all()


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("case", PACKED)
def test_varlen_attn(case):
    """PyTorch's function for users, with autograd."""
    varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    problem, x = packed_inputs(case)
    if x.q.shape[1] != x.k.shape[1]:
        x.k, x.v = (t.repeat_interleave(2, 1) for t in (x.k, x.v))
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    out = varlen_attn(q, k, v, x.cu_seqlens_q, x.cu_seqlens_k, problem.max_q, problem.max_k)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape and not any(t.any() for t in (out, *gradients))


@pytest.mark.usefixtures("strict")
def test_a_longest_sequence_of_nothing_is_what_cu_seqlens_says():
    """Where max_q and max_k are 0 while sequences have rows, cu_seqlens counts."""
    problem = Problem(seqlens_q=(65, 7), seqlens_k=(65, 7), varlen=True, heads=2, heads_kv=2)
    x = make_inputs(problem)
    out, lse = torch.ops.aten._flash_attention_forward(
        x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, 0, 0, 0.0, False, False
    )[:2]  # fmt: skip
    assert_matches_reference(problem, x, Result(out, lse))
