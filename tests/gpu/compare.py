"""Applies the comparison rule of FlashAttention's own tests: at most twice the error of
same-precision math, plus two roundings."""

from __future__ import annotations

import torch
from cases import Inputs, Problem
from reference import FARTHEST_LSE_WITH_GRADIENTS, Result, compute

# Where the exact gradient is 0 (a row that sees one key), dP - delta leaves the noise of two fp32
# sums, and plain math leaves none.
GRADIENT_FLOOR = 1e-4
LSE_TOLERANCE = 5e-4


def _where(flat_index: int, shape) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat_index), shape))


def _assert_same_class(name: str, classify, ours: torch.Tensor, truth: torch.Tensor) -> None:
    """Asserts that NaN and inf stand where they should, and nowhere else."""
    wrong = classify(ours) != classify(truth)
    if wrong.any():
        index = _where(int(wrong.flatten().int().argmax()), wrong.shape)
        raise AssertionError(
            f"{name}: {classify.__name__} differs at {int(wrong.sum())} of {wrong.numel()} places, "
            f"first {index}: "
            f"ours {ours[index].item()}, fp32 reference {truth[index].item()}"
        )


def assert_close(
    name: str, ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, floor: float = 0.0
) -> None:
    """Compares a result. `plain` is same-precision math, `truth` fp32 math on the same inputs."""
    assert ours.shape == truth.shape, (
        f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    )
    if not truth.numel():
        return
    for classify in (torch.isnan, torch.isinf):
        _assert_same_class(name, classify, ours, truth)
    error = (ours.float() - truth).abs()
    plain_error = (plain.float() - truth).abs().max().item()
    rounded = truth.to(ours.dtype)
    rounding = (rounded + 0.3 - 0.3 - rounded).abs().max().item()
    allowed = 2 * plain_error + 2 * rounding + floor
    worst = error.max().item()
    if not worst <= allowed:
        index = _where(int(error.flatten().argmax()), error.shape)
        raise AssertionError(
            f"{name}: error {worst:.3e} > {allowed:.3e} = "
            f"2 * {plain_error:.3e} (plain math) + 2 * {rounding:.3e} (rounding) + {floor:.0e}; "
            f"worst at {index} of {tuple(ours.shape)}: ours {ours[index].item():.6f}, "
            f"same-precision {plain[index].item():.6f}, "
            f"fp32 {truth[index].item():.6f}; {int((error > allowed).sum())} of {error.numel()} "
            "beyond"
        )


def assert_lse(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """Asserts that lse is fp32 and a natural logarithm, and -inf for a row that sees no key (the
    FA3/FA4 convention; FA2 writes +inf). Where it is so far from zero that the row has no
    gradients, it may be any other number as far."""
    assert ours.dtype == torch.float32, f"lse: {ours.dtype}"
    assert ours.shape == truth.shape, (
        f"lse: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    )
    for classify in (torch.isnan, torch.isposinf, torch.isneginf):
        _assert_same_class("lse", classify, ours, truth)
    far = torch.isfinite(truth) & (truth.abs() > FARTHEST_LSE_WITH_GRADIENTS)
    assert (ours[far].abs() > FARTHEST_LSE_WITH_GRADIENTS).all(), (
        "lse: a row without gradients may have some"
    )
    finite = torch.isfinite(truth) & ~far
    if finite.any():
        error = torch.where(finite, (ours - truth).abs(), 0.0)
        index = _where(int(error.flatten().argmax()), error.shape)
        allowed = LSE_TOLERANCE * max(1.0, truth[index].abs().item() / 16)
        assert error[index].item() <= allowed, (
            f"lse: error {error[index].item():.3e} > {allowed:.3e} at {index}: "
            f"ours {ours[index].item()}, fp32 {truth[index].item()}"
        )


def assert_matches_reference(
    problem: Problem, inputs: Inputs, ours: Result, *, check_lse: bool = True
) -> None:
    """Compares every output that `ours` holds against fp32."""
    backward = ours.dq is not None
    truth = compute(problem, inputs, torch.float32, backward=backward)
    plain = compute(problem, inputs, problem.dtype, backward=backward)
    assert_close("out", ours.out, plain.out, truth.out)
    if check_lse:
        assert_lse(ours.lse, truth.lse)
    if backward:
        for name in ("dq", "dk", "dv"):
            assert_close(
                name,
                getattr(ours, name),
                getattr(plain, name),
                getattr(truth, name),
                GRADIENT_FLOOR,
            )
