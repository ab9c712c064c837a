"""Inputs with which flash attention's own tests caught bugs: large values beside short tiles, and
keys beyond the last."""

from __future__ import annotations

import pytest
import torch
from calls import flash_forward, run_flash
from cases import DEVICE, MASKS, Inputs, dense, make_inputs, varlen
from compare import assert_close, assert_matches_reference
from reference import compute

pytestmark = pytest.mark.usefixtures("strict")


def scaled_inputs(problem, query_factor: float, key_factor: float) -> Inputs:
    inputs = make_inputs(problem)
    for tensor, factor in (
        (inputs.q, query_factor),
        (inputs.k, key_factor),
        (inputs.v, key_factor),
    ):
        tensor.mul_(factor)
    return inputs


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", (16, 32, 64, 128))
@pytest.mark.parametrize("seqlen", (2, 5, 17, 128))
def test_scores_of_hundreds(seqlen, head_dim, mask):
    """What lies beyond the last key must not reach dq: its exponent would overflow. Many rows, so
    that the worst errors compare."""
    problem = dense(
        seqlen,
        seqlen,
        batch=64,
        heads=5,
        heads_kv=5,
        head_dim=head_dim,
        dtype=torch.float16,
        **MASKS[mask],
    )
    inputs = scaled_inputs(problem, 5, 3)
    assert_matches_reference(problem, inputs, run_flash(problem, inputs, backward=True))


@pytest.mark.parametrize("mask", ("full", "causal"))
@pytest.mark.parametrize("head_dim", (16, 32, 64, 128))
def test_many_queries_of_one_key(head_dim, mask):
    """The softmax of one key is 1 whatever its score, so that the gradients of queries and keys are
    0 but for rounding."""
    problem = varlen(
        (76, 34, 146),
        (1, 1, 1),
        heads=5,
        heads_kv=5,
        head_dim=head_dim,
        dtype=torch.float16,
        **MASKS[mask],
    )
    inputs = scaled_inputs(problem, 3, 3)
    result = run_flash(problem, inputs, backward=True)
    for name in ("dq", "dk"):
        worst = getattr(result, name).abs().max().item()
        # The error is of products of hundreds.
        assert worst <= 1e-2, f"{name}: {worst:.3e}, should be 0"
    truth, plain = (
        compute(problem, inputs, dtype, backward=True) for dtype in (torch.float32, problem.dtype)
    )
    assert_close("out", result.out, plain.out, truth.out)
    assert_close("dv", result.dv, plain.dv, truth.dv)


@pytest.mark.xfail(
    strict=True,
    reason="the kernels fuse score * scale - maximum, which rounds by hundreds beyond 2^31",
)
def test_scores_beyond_any_models():
    """PyTorch's own case: its kernel multiplies and subtracts apart, so that the one key's
    probability is exactly 1."""
    same = torch.full((1, 1, 1, 64), 133120.0, dtype=torch.bfloat16, device=DEVICE)
    out = flash_forward(
        dense(1, 1, batch=1, heads=1, heads_kv=1, head_dim=64), Inputs(same, same, same, do=None)
    )[0]
    assert torch.equal(out, same), f"{int(out.isnan().sum())} of {out.numel()} elements are NaN"
