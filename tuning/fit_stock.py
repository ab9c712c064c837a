"""Fits the planner's speed rules to measurements, and says what they cost: `python -m
tuning.fit_stock`.

The measurements, tuning/results/h200_stock.csv, come from `python -m tuning.stock --csv PATH`. A
rule is a box in the features of a problem in which the stock kernel was measured to be faster
somewhere. Between a measured point that stock won and one that ours won, the boundary is at the
latter. A few problems in the boxes would therefore be faster on ours; the command counts them.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kernels import rules
from kernels.rules import Range, Rule, inside
from tuning.boxes import Features, classes, features, merged

MEASURED = Path(__file__).parent / "results" / "h200_stock.csv"
# A ratio up to it counts as equal.
NOISE = 1.05


@dataclass(frozen=True)
class Row(Features):
    """A measured problem."""

    ratio: float  # our time over stock's


def lines(path: Path = MEASURED) -> list[dict[str, str]]:
    """Returns the lines of the file without those of the decode kernel, to which no speed rule
    applies: docs/kernels-sm90.md has its measurements."""
    with open(path, newline="") as file:
        return [line for line in csv.DictReader(file) if line["kernel"] != "decode"]


def read(path: Path = MEASURED) -> list[Row]:
    return [
        Row(**features(line), ratio=float(line["ours_us"]) / float(line["stock_us"]))
        for line in lines(path)
    ]


def lost(rows: Iterable[Row], feature: Callable[[Row], int]) -> list[Range]:
    """Returns the ranges of a feature in which our kernel is slower on at least one row."""
    worst: dict[int, float] = {}
    for row in rows:
        worst[feature(row)] = max(worst.get(feature(row), 0.0), row.ratio)
    values = sorted(worst)
    ranges: list[Range] = []
    for i, value in enumerate(values):
        if worst[value] <= NOISE:
            continue
        low = values[i - 1] + 1 if i else 0
        high = values[i + 1] - 1 if i + 1 < len(values) else math.inf
        # A single value that ours won between two that it lost is luck.
        if ranges and ranges[-1][1] >= low - 2:
            ranges[-1] = (ranges[-1][0], high)
        else:
            ranges.append((low, high))
    return ranges


def backwards(rows: list[Row], layout: str) -> Iterable[tuple[int, bool, list[Row]]]:
    """Returns the rows that rules are fitted to together, with their head dim and whether heads are
    grouped."""
    for head_dim in sorted({row.head_dim for row in rows}):
        for grouped in (False, True):
            kind = ("backward", layout, head_dim, grouped)
            here = [r for r in rows if (r.op, r.layout, r.head_dim, r.grouped) == kind]
            yield head_dim, grouped, here


def within(rows: Iterable[Row], queries: Range) -> Iterable[Row]:
    return (row for row in rows if inside(queries, row.queries))


def dense_backward(rows: list[Row]) -> Iterable[Rule]:
    """Yields the rules for few queries against many keys. There, under GQA, the time goes into
    clearing and converting the accumulators of dK and dV."""
    for head_dim, grouped, here in backwards(rows, "dense"):
        for queries in ((0, 128), (129, 256), (257, math.inf)):
            for keys in lost(within(here, queries), lambda row: row.keys):
                yield Rule(
                    "backward", "dense", head_dim, grouped=grouped, queries=queries, keys=keys
                )


def varlen_backward(rows: list[Row]) -> Iterable[Rule]:
    """Yields the rules for short sequences, which leave most of a tile empty, and for many
    sequences, among which every CTA has to search for its own."""
    for head_dim, grouped, here in backwards(rows, "varlen"):
        for queries in classes(1 << (row.queries.bit_length() - 1) for row in here):
            for batch in lost(within(here, queries), lambda row: row.batch):
                yield Rule(
                    "backward", "varlen", head_dim, grouped=grouped, queries=queries, batch=batch
                )


def fit(rows: list[Row]) -> tuple[Rule, ...]:
    """Returns the rules. Forwards have none: stock is faster on few rows and by little, and these
    rows do not form a box."""
    return tuple(merged([*dense_backward(rows), *varlen_backward(rows)]))


def main() -> None:
    rows = read()
    found = fit(rows)
    rules.write(Rule, found, rules.SPEED_RULES)
    left = {row for row in rows if any(rule.holds(row) for rule in found)}
    taken = [row for row in rows if row not in left]
    print(
        f"{len(found)} rules; stock gets {len(rows) - len(taken)} of {len(rows)} measured problems"
    )
    for op in ("forward", "backward"):
        ratios = [row.ratio for row in taken if row.op == op]
        slower = sum(ratio > NOISE for ratio in ratios)
        print(
            f"{op}: ours takes {len(ratios)}, at worst {max(ratios):.2f} times stock's time, on "
            f"{slower} more than {NOISE}"
        )
    given_up = [row for row in left if row.ratio < 0.9]
    print(f"{len(given_up)} of those that stock gets would be faster on ours by a tenth or more")


if __name__ == "__main__":
    main()
