"""Fits the planner's tile rules to measurements, and says what they give: `python -m
tuning.fit_tiles`.

The measurements, tuning/results/h200_tiles.csv, come from `python -m tuning.tiles`. A rule is a box
in the features of a problem in which a candidate's tile was measured to be faster than the
default's by more than noise, and slower nowhere. Measurements against a tile that is no longer the
default, or of a tile that is no longer a candidate, are ignored.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean

from kernels import rules
from kernels.matrix import candidates, matrix
from kernels.rules import Range, TileRule
from tuning.boxes import Features, class_of, features, merged
from tuning.tiles_grid import SM_COUNT, defaults, tile

MEASURED = Path(__file__).parent / "results" / "h200_tiles.csv"
# A geometric mean of the speedups in a box up to it counts as noise.
GAIN = 1.03
# No speedup in a box may be lower.
WORST = 0.99
PROBLEMS = 2  # in a box, at least
# The columns that tell problems apart.
PROBLEM = (
    "direction", "dtype", "layout", "batch", "heads", "heads_kv", "seqlen_q", "head_dim", "causal",
    "uniform",
)  # fmt: skip
# The last class holds 2^14 rows a sequence and more.
LONGEST_CLASS = 14
# The ranges are of the tile's rows in whole tiles, in per cent of those in the default's. They show
# what the tile saves, or wastes, of the last one.
ROWS_CLASSES = ((0, 74), (75, 94), (95, 104), (105, math.inf))
# The ranges are of the default's query tiles per 100 SMs. A tile of two thirds of the rows still
# fits a single wave up to 66; from 400 on, a partial last wave matters little.
TILES_CLASSES = ((0, 66), (67, 100), (101, 399), (400, math.inf))
UNMEASURED = dict(
    problems=0, default_tflops=0.0, tuned_tflops=0.0, worst_speedup=0.0,
    worst_speedup_over_stock=0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Row(Features):
    """A candidate on a problem."""

    problem: tuple[str, ...]
    block_m: int
    block_n: int
    rows: int
    tiles: int
    default_tflops: float
    tuned_tflops: float
    speedup_over_stock: float

    @property
    def speedup(self) -> float:
        return self.tuned_tflops / self.default_tflops


def lines(path: Path = MEASURED) -> list[dict[str, str]]:
    """Returns the lines of the file whose default and candidate tiles are still those of
    kernels/."""
    kinds = {
        (k.op.value, k.layout.value, str(k.head_dim), k.mask.value, tile(k), tile(candidate))
        for k in defaults()
        for candidate in candidates(k)
    }

    def kind(line: dict[str, str]) -> tuple[str, ...]:
        mask = features(line)["mask"]
        names = ("direction", "layout", "head_dim")
        return (*(line[name] for name in names), mask, line["default_tile"], line["tile"])

    with open(path, newline="") as file:
        return [line for line in csv.DictReader(file) if kind(line) in kinds]


def row_of(line: dict[str, str]) -> Row:
    found = features(line)
    queries = found["queries"]
    default_m = int(line["default_tile"].split("x")[0])
    block_m, block_n = map(int, line["tile"].split("x"))
    default_a_head = math.ceil(queries / default_m)
    us, default_us, stock_us = (float(line[name]) for name in ("us", "default_us", "stock_us"))
    return Row(
        **found,
        problem=tuple(line[name] for name in PROBLEM),
        block_m=block_m,
        block_n=block_n,
        rows=100 * math.ceil(queries / block_m) * block_m // (default_a_head * default_m),
        tiles=100 * int(line["batch"]) * int(line["heads"]) * default_a_head // SM_COUNT,
        default_tflops=1e3 * float(line["gflop"]) / default_us,
        tuned_tflops=1e3 * float(line["gflop"]) / us,
        speedup_over_stock=stock_us / us,
    )


def read(path: Path = MEASURED) -> list[Row]:
    return [row_of(line) for line in lines(path)]


def queries_class(queries: int) -> Range:
    """Returns the range, from a power of two up to the next, that holds this number of queries."""
    exponent = min(queries.bit_length() - 1, LONGEST_CLASS)
    return 1 << exponent, math.inf if exponent == LONGEST_CLASS else (2 << exponent) - 1


def gain(rows: list[Row]) -> float:
    return geometric_mean(row.speedup for row in rows)


def wins(rows: list[Row]) -> bool:
    speedups = [row.speedup for row in rows]
    return len(rows) >= PROBLEMS and gain(rows) >= GAIN and min(speedups) >= WORST


def box_of(row: Row) -> TileRule:
    """Returns the smallest box that holds a row, with its measured columns still empty."""
    return TileRule(
        row.op, row.layout, row.head_dim, row.mask, queries=queries_class(row.queries),
        rows=class_of(row.rows, ROWS_CLASSES), tiles=class_of(row.tiles, TILES_CLASSES),
        block_m=row.block_m, block_n=row.block_n, beats_stock=True, **UNMEASURED,
    )  # fmt: skip


def cells(rows: Iterable[Row]) -> dict[TileRule, list[Row]]:
    found: dict[TileRule, list[Row]] = {}
    for row in rows:
        found.setdefault(box_of(row), []).append(row)
    return found


def chosen(rows: Iterable[Row]) -> list[TileRule]:
    """Returns the boxes in which a candidate wins. A box that no longer wins without the problems
    of boxes that gain more is left out."""
    winning = sorted(
        (item for item in cells(rows).items() if wins(item[1])), key=lambda item: -gain(item[1])
    )
    boxes, served = [], set()
    for box, measured in winning:
        if wins([row for row in measured if row.problem not in served]):
            beats_stock = min(row.speedup_over_stock for row in measured) >= 1
            boxes.append(replace(box, beats_stock=beats_stock))
            served |= {row.problem for row in measured}
    return boxes


def measured_in(box: TileRule, rows: list[Row]) -> TileRule:
    """Returns the box with the measurements of its tile filled in."""
    here = [
        row
        for row in rows
        if (row.block_m, row.block_n) == (box.block_m, box.block_n) and box.holds(row)
    ]
    return replace(
        box, problems=len(here),
        default_tflops=round(geometric_mean(row.default_tflops for row in here), 1),
        tuned_tflops=round(geometric_mean(row.tuned_tflops for row in here), 1),
        worst_speedup=round(min(row.speedup for row in here), 3),
        worst_speedup_over_stock=round(min(row.speedup_over_stock for row in here), 3),
    )  # fmt: skip


def fit(rows: list[Row]) -> tuple[TileRule, ...]:
    """Returns the rules. Within a kind of call, those that gain most come first, because a problem
    gets the first rule that holds for it."""
    return tuple(
        sorted(
            (measured_in(box, rows) for box in merged(chosen(rows))),
            key=lambda r: (r.op, r.layout, r.head_dim, r.mask, r.default_tflops / r.tuned_tflops),
        )
    )


def main() -> None:
    # There are no arguments; --help and a mistyped one must write nothing.
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = fit(read())
    rules.write(TileRule, found, rules.TILE_RULES)
    tuned = sum(kernel.tuned for kernel in matrix())
    print(
        f"{len(found)} rules from {MEASURED.name} in {rules.TILE_RULES.name}; a wheel holds "
        f"{tuned} kernels for them"
    )
    for r in found:
        print(
            f"  {r.op} {r.layout} D{r.head_dim} {r.mask} {r.block_m}x{r.block_n}: "
            f"{r.tuned_tflops / r.default_tflops:.3f}x, at worst {r.worst_speedup:.3f}x; "
            f"{r.worst_speedup_over_stock:.2f}x stock's speed"
        )


if __name__ == "__main__":
    main()
