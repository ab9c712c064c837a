"""Measures the device time of every contender on a list of problems. A contender's results are
checked against fp32 before it is timed."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from fa4_ext.bench.contenders import Contender
from fa4_ext.bench.correctness import check, make_cu_seqlens, make_inputs, truth
from fa4_ext.bench.masks import Mask, make_mask
from fa4_ext.bench.progress import Progress
from fa4_ext.bench.shapes import Shape
from fa4_ext.bench.timing import Prepared, in_turns, prepare, sets_for, summary

TARGET_MS = 8.0  # of one timed run: long beside the launch of a graph


@dataclass(frozen=True)
class Problem:
    """What every contender gets of a shape: its inputs, and what is right for them."""

    shape: Shape
    dtype: str
    sets: list
    mask: Mask | None
    truths: Callable[[int], list[tuple[torch.Tensor, ...]]]  # of the i-th set


def attention_of(
    contender: Contender, shape: Shape, mask: Mask | None = None
) -> Callable[..., torch.Tensor]:
    """Returns the contender's attention as a function of q, k and v, with the problem's other
    arguments bound."""
    function = contender.function(shape)
    if function is None:
        raise ValueError(f"{contender.name} has no function for {shape.name}")
    if mask:
        return lambda q, k, v: function(q, k, v, mask)
    if not shape.lengths:
        return lambda q, k, v: function(q, k, v, shape.causal)
    cu_seqlens = make_cu_seqlens(shape)
    return lambda q, k, v: function(q, k, v, cu_seqlens, shape.longest, shape.causal)


def _calls(
    contender: Contender, problem: Problem, direction: str
) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Returns a function that runs the direction on the i-th set of inputs. The backward is timed
    without its forward: one forward for each set leaves the autograd graph, which is kept."""
    attention, sets = attention_of(contender, problem.shape, problem.mask), problem.sets
    if direction == "forward":

        def forward(i):
            with torch.no_grad():
                return (attention(*sets[i][:3]),)

        return forward
    graphs = []
    with contender.enabled():
        for *qkv, do in sets:
            leaves = [t.detach().requires_grad_() for t in qkv]
            graphs.append((attention(*leaves), leaves, do))

    def backward(i):
        out, leaves, do = graphs[i]
        return torch.autograd.grad(out, leaves, do, retain_graph=True)

    return backward


def _prepare(contender: Contender, problem: Problem, direction: str) -> tuple[Prepared, float]:
    """Prepares the work for timing and checks its outputs. Returns the prepared work and the
    relative error."""
    calls, count = _calls(contender, problem, direction), len(problem.sets)
    prepared = prepare(calls, count, contender.enabled, TARGET_MS)
    expected = problem.truths((prepared.calls - 1) % count if prepared.captured else 0)
    kept = slice(0, 1) if direction == "forward" else slice(1, 4)
    truths = [of_corner[kept] for of_corner in expected]
    return prepared, check(problem.shape, problem.dtype, prepared.outputs, truths)


def _row(contenders: list[Contender], problem: Problem, direction: str, rounds: int) -> dict:
    shape = problem.shape
    ready: dict[str, tuple[Prepared, float]] = {}
    results: dict[str, dict] = {}
    name = f"{shape.name} {direction}"
    for contender in contenders:
        if not contender.has(shape, problem.dtype, direction):
            continue
        try:
            ready[contender.name] = _prepare(contender, problem, direction)
        except Exception as error:
            # Other packages raise errors of their own types.
            print(f"\n{contender.name}, {name}: not timed: {error}", file=sys.stderr)
            results[contender.name] = {"error": f"{error!r:.300}"}
    measured = in_turns({who: prepared for who, (prepared, _) in ready.items()}, rounds)
    for who, times in measured.items():
        prepared, relative_error = ready[who]
        results[who] = summary(times) | {
            "captured": prepared.captured,
            "relative_error": relative_error,
        }
        results[who]["tflops"] = shape.flops(direction) / results[who]["ms"] / 1e9
    fields = {key: value for key, value in vars(shape).items() if key != "lengths"} | {
        "layout": shape.layout
    }
    return fields | {
        "name": name,
        "direction": direction,
        "results": results,
        "speed_of_ours": speed_of_ours(measured),
    }


def measure(
    contenders: list[Contender],
    shapes: Sequence[Shape],
    directions: Sequence[str],
    dtype: str,
    rounds: int,
) -> list[dict]:
    """Returns a row for each shape and direction, with the shape and, for each contender, median
    milliseconds, spread, TFLOP/s and relative error, or why it was not timed."""
    rows = []
    progress = Progress(len(shapes) * len(directions), what="problems")
    for shape in shapes:
        sets = [make_inputs(shape, dtype) for _ in range(max(2, sets_for(shape.bytes)))]
        # The layers of a model have one mask, so the sets have one.
        mask = make_mask(shape, sets[0][0])
        truths = cache(lambda i, shape=shape, sets=sets, mask=mask: truth(shape, sets[i], mask))
        problem = Problem(shape, dtype, sets, mask, truths)
        for direction in directions:
            progress.started(f"{shape.name} {direction}")
            rows.append(_row(contenders, problem, direction, rounds))
            progress.finished()
    return rows


def speed_of_ours(measured: dict[str, list[float]]) -> dict[str, float]:
    """Returns our speed over each other contender's: the median of the rounds' ratios, because
    within a round both meet the same clocks."""
    ours = measured.get("ours", [])
    others = {name: times for name, times in measured.items() if name != "ours" and ours}
    return {
        name: statistics.median(b / a for a, b in zip(ours, times, strict=True))
        for name, times in others.items()
    }
