"""Fits the planner's speed rules to measurements, and says what they cost: `python -m
tuning.fit_stock`.

The measurements, tuning/results/h200_stock.csv against PyTorch's flash attention and h200_cudnn.csv
against cuDNN, come from `python -m tuning.stock`. A rule is a box in the features of a problem in
which this peer was measured to be faster. In a box of flash's, that was so somewhere: between a
measured point that flash won and one that ours won, the boundary is at the latter.
tuning/fit_cudnn.py has cuDNN's boxes. A few problems in the boxes are faster on ours; the command
counts them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable

from kernels import rules
from kernels.rules import Range, Rule, inside
from tuning import fit_cudnn
from tuning.boxes import classes, merged
from tuning.stock_rows import MEASURED, Row, read

# A ratio of a problem up to it counts as equal to flash, and to cuDNN.
NOISE = {"flash": 1.05, "cudnn": fit_cudnn.NOISE}


def lost(rows: Iterable[Row], feature: Callable[[Row], int]) -> list[Range]:
    """Returns the ranges of a feature in which our kernel is slower on at least one row."""
    worst: dict[int, float] = {}
    for row in rows:
        worst[feature(row)] = max(worst.get(feature(row), 0.0), row.ratio)
    values = sorted(worst)
    ranges: list[Range] = []
    for i, value in enumerate(values):
        if worst[value] <= NOISE["flash"]:
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
                    "backward", "dense", head_dim, grouped=grouped, peer="flash",
                    queries=queries, keys=keys,
                )  # fmt: skip


def varlen_backward(rows: list[Row]) -> Iterable[Rule]:
    """Yields the rules for short sequences, which leave most of a tile empty, and for many
    sequences, among which every CTA has to search for its own."""
    for head_dim, grouped, here in backwards(rows, "varlen"):
        for queries in classes(1 << (row.queries.bit_length() - 1) for row in here):
            for batch in lost(within(here, queries), lambda row: row.batch):
                yield Rule(
                    "backward", "varlen", head_dim, grouped=grouped, peer="flash",
                    queries=queries, batch=batch,
                )  # fmt: skip


def fit(rows: list[Row]) -> tuple[Rule, ...]:
    """Returns the rules. Forwards have none about flash: it is faster on few rows and by little,
    and these rows do not form a box."""
    of = {peer: [row for row in rows if row.peer == peer] for peer in MEASURED}
    flash = merged([*dense_backward(of["flash"]), *varlen_backward(of["flash"])])
    return (*flash, *fit_cudnn.fit_cudnn(of["cudnn"]))


def print_summary(peer: str, rows: list[Row], found: tuple[Rule, ...]) -> None:
    """Prints what the peer gets, and what the rules leave to be lost."""
    left = [row for row in rows if any(rule.holds(row) for rule in found)]
    taken = [row for row in rows if not any(rule.holds(row) for rule in found)]
    count = sum(rule.peer == peer for rule in found)
    print(f"{count} rules; {peer} gets {len(left)} of {len(rows)} measured problems")
    for op in sorted({row.op for row in taken}):
        ratios = [row.ratio for row in taken if row.op == op]
        slower = sum(ratio > NOISE[peer] for ratio in ratios)
        print(
            f"{op}: ours takes {len(ratios)}, at worst {max(ratios):.2f} times {peer}'s time, on "
            f"{slower} more than {NOISE[peer]}"
        )
    given_up = sum(row.ratio < 0.9 for row in left)
    print(f"{given_up} of those that {peer} gets would be faster on ours by a tenth or more")


def main() -> None:
    # There are no arguments; --help and a mistyped one must write nothing.
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = read()
    found = fit(rows)
    rules.write(Rule, found, rules.SPEED_RULES)
    for peer in MEASURED:
        if of_peer := [row for row in rows if row.peer == peer]:
            print_summary(peer, of_peer, found)


if __name__ == "__main__":
    main()
