"""Holds results to the rule that docs/using.md states: at most twice the error of same-precision
math, plus two roundings."""

from __future__ import annotations

import torch

# Where the exact gradient is 0 (a row that sees one key), dP - delta leaves the noise of two fp32
# sums, and plain math leaves none.
_GRADIENT_FLOOR = 1e-4
_LSE_TOLERANCE = 5e-4


def what_is_wrong(
    ours: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
) -> str | None:
    """Returns what is wrong with the first of our results that is, with its numbers, or None.

    Args:
        ours: some of the results that reference.compute names.
        plain: those of math in our results' dtype.
        truth: those of math in fp32.
    """
    for name, result in ours.items():
        wrong = (
            _lse(result, truth[name])
            if name == "lse"
            else _result(
                result, plain[name], truth[name], 0.0 if name == "out" else _GRADIENT_FLOOR
            )
        )
        if wrong:
            return f"{name}: {wrong}"
    return None


def _result(
    ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, floor: float
) -> str | None:
    if wrong := _shape_or_class(ours, truth):
        return wrong
    rounded = truth.to(ours.dtype)
    rounding = _largest((rounded + 0.3 - 0.3 - rounded).abs())
    allowed = 2 * _largest((plain.float() - truth).abs()) + 2 * rounding + floor
    error = (ours.float() - truth).abs()
    return _beyond(error, torch.full_like(error, allowed), ours, truth)


def _lse(ours: torch.Tensor, truth: torch.Tensor) -> str | None:
    if wrong := _shape_or_class(ours, truth):
        return wrong
    finite = torch.isfinite(truth)
    error = torch.where(finite, (ours - truth).abs(), 0.0)
    size = torch.where(finite, truth.abs(), 0.0)
    return _beyond(error, _LSE_TOLERANCE * (size / 16).clamp(min=1.0), ours, truth)


def _shape_or_class(ours: torch.Tensor, truth: torch.Tensor) -> str | None:
    """NaN and infinities must stand where they do in the truth, and nowhere else."""
    if ours.shape != truth.shape:
        return f"shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    for classify in (torch.isnan, torch.isposinf, torch.isneginf):
        differs = classify(ours) != classify(truth)
        if count := int(differs.sum()):
            where = _first(differs)
            return (
                f"{classify.__name__} differs in {count} of {differs.numel()} elements, first at "
                f"{where}: {ours[where].item()}, in fp32 {truth[where].item()}"
            )
    return None


def _beyond(
    error: torch.Tensor, allowed: torch.Tensor, ours: torch.Tensor, truth: torch.Tensor
) -> str | None:
    beyond = ~(error <= allowed)  # also where either is NaN
    count = int(beyond.sum())
    if not count:
        return None
    excess = error - allowed
    where = _first(excess == excess.max())
    most = allowed[where].item()
    return (
        f"error {error[where].item():.2e} against fp32, at most {most:.2e} is right; {count} of "
        f"{error.numel()} elements are beyond, the worst at {where}: {ours[where].item():.6g}, in "
        f"fp32 {truth[where].item():.6g}"
    )


def _largest(values: torch.Tensor) -> float:
    return values.max().item() if values.numel() else 0.0


def _first(flags: torch.Tensor) -> tuple[int, ...]:
    flat = flags.flatten().int().argmax().cpu()
    return tuple(int(index) for index in torch.unravel_index(flat, flags.shape))
