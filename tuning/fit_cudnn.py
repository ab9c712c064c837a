"""Fits the speed rules about cuDNN: boxes around the problems that it was measured to run faster.

A box belongs to one kernel, one mask, and heads that are grouped or not. It starts
unbounded around the problem on which cuDNN gains most. Each win of ours inside cuts it in the
number of queries, keys or sequences, half way to the nearest loss.
"""

from __future__ import annotations

import math
from statistics import geometric_mean

from kernels.rules import ANY, Range, Rule, inside
from tuning.stock_rows import Row

# A ratio above it is a loss of ours.
NOISE = 1.02
# A ratio up to it is a win. Ratios between the two bound no box: missing a gain of 5% costs less
# than being slower than without us.
WIN = 0.95
RANGES = ("queries", "keys", "batch")
ONE_QUERY = (0, 1)

Point = tuple[int, ...]  # a number for each of RANGES


def kind(row: Row) -> dict:
    """Returns the selectors of a row's rule. The decode kernel serves all masks."""
    return dict(
        op=row.op,
        layout=row.layout,
        head_dim=row.head_dim,
        head_dim_v=row.head_dim_v,
        mask=None if row.op == "decode" else row.mask,
        grouped=row.grouped,
        peer=row.peer,
    )


def ratios(rows: list[Row]) -> dict[Point, float]:
    """Returns the ratio of each point. Rows that differ in heads alone share a point, and its ratio
    is their geometric mean."""
    found: dict[Point, list[float]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in RANGES), []).append(row.ratio)
    return {point: geometric_mean(every) for point, every in found.items()}


def holds(box: list[Range], point: Point) -> bool:
    return all(inside(bounds, value) for bounds, value in zip(box, point, strict=True))


def grown(seed: Point, losses: list[Point], wins: list[Point]) -> list[Range]:
    """Returns a box around the seed that holds no win. The nearest win bounds it first, in the
    number by which the two differ most, half way to the loss that is next to the win. Distances are
    between logarithms."""

    def distances(point: Point) -> list[float]:
        return [abs(math.log(a / b)) for a, b in zip(point, seed, strict=True)]

    box = [ANY] * len(RANGES)
    for win in sorted(wins, key=lambda win: (math.hypot(*distances(win)), win)):
        if not holds(box, win):
            continue
        apart = distances(win)
        i = apart.index(max(apart))
        low, high = box[i]
        held = [loss[i] for loss in losses if holds(box, loss)]
        if win[i] < seed[i]:
            box[i] = (math.isqrt(win[i] * min(n for n in held if n > win[i])) + 1, high)
        else:
            box[i] = (low, math.isqrt(win[i] * max(n for n in held if n < win[i])))
    return box


def boxes(measured: dict[Point, float]) -> list[list[Range]]:
    """Returns boxes that together hold all losses and no win."""
    wins = [point for point, ratio in measured.items() if ratio <= WIN]
    losses = [point for point, ratio in measured.items() if ratio > NOISE]
    found: list[list[Range]] = []
    for seed in sorted(losses, key=lambda point: (-measured[point], point)):
        if not any(holds(box, seed) for box in found):
            found.append(grown(seed, losses, wins))
    return found


def one_query_is_lost(rows: list[Row]) -> bool:
    """Returns whether cuDNN is the faster one on average over one query. Where wins and losses lie
    side by side, boxes between them would be noise."""
    one = [row.ratio for row in rows if row.queries == 1]
    return bool(one) and geometric_mean(one) > 1


def fit_cudnn(rows: list[Row]) -> list[Rule]:
    kinds: dict[tuple, list[Row]] = {}
    for row in rows:
        kinds.setdefault(tuple(kind(row).items()), []).append(row)
    rules = []
    for selectors, here in sorted(kinds.items(), key=lambda item: str(item[0])):
        found = []
        if one_query_is_lost(here):
            found.append([ONE_QUERY, ANY, ANY])
            here = [row for row in here if row.queries > 1]
        found += boxes(ratios(here))
        rules += [Rule(**dict(selectors), **dict(zip(RANGES, box, strict=True))) for box in found]
    return rules
