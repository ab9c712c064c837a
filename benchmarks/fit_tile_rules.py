"""Fits the planner's tile rules to measurements, and says what they give: `python -m
benchmarks.fit_tile_rules`.

The measurements, benchmarks/results/h200_tuning.csv, come from `python -m benchmarks.tune`. A rule
is a box in the features of a problem in which a candidate's tile was measured to be faster than the
default's by more than noise, and slower nowhere.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from benchmarks.fit_speed_rules import MAX, inside, merged
from benchmarks.tune_grid import SM_COUNT
from kernels import tile_rules
from kernels.matrix import matrix
from kernels.tile_rules import TileRule

MEASURED = Path(__file__).parent / "results" / "h200_tuning.csv"
GAIN = 1.03  # a geometric mean of the speedups in a box up to it counts as noise
WORST = 0.99  # of the speedups in a box
PROBLEMS = 2  # in a box, at least
# The columns that tell problems apart.
PROBLEM = (
    "direction",
    "dtype",
    "layout",
    "batch",
    "heads",
    "heads_kv",
    "seqlen_q",
    "head_dim",
    "causal",
    "uniform",
)
LONGEST_CLASS = 14  # 2^14 rows a sequence and more
# Rows of the tile's in whole tiles, per cent of those in the default's: what the tile saves, or
# wastes, of the last one.
ROWS_CLASSES = ((0, 74), (75, 94), (95, 104), (105, MAX))
# Query tiles of the default, per 100 multiprocessors. A tile of two thirds of the rows still fits a
# single wave up to 66; from 400 on, a partial last wave matters little.
TILES_CLASSES = ((0, 66), (67, 100), (101, 399), (400, MAX))


@dataclass(frozen=True)
class Row:
    """A candidate on a problem."""

    problem: tuple[str, ...]
    op: str
    layout: str
    head_dim: int
    mask: str
    block_m: int
    block_n: int
    queries: int
    rows: int
    tiles: int
    default_tflops: float
    tuned_tflops: float
    speedup_over_stock: float

    @property
    def speedup(self) -> float:
        return self.tuned_tflops / self.default_tflops


@dataclass(frozen=True)
class Box:
    op: str
    layout: str
    head_dim: int
    mask: str
    block_m: int
    block_n: int
    beats_stock: bool
    queries: tuple
    rows: tuple
    tiles: tuple

    def holds(self, row: Row) -> bool:
        kind = ("op", "layout", "head_dim", "mask", "block_m", "block_n")
        return all(getattr(self, name) == getattr(row, name) for name in kind) and all(
            inside(getattr(self, name), getattr(row, name)) for name in ("queries", "rows", "tiles")
        )


def read(path: Path = MEASURED) -> list[Row]:
    """Nothing when there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row_of(line) for line in csv.DictReader(file)]


def row_of(line: dict[str, str]) -> Row:
    queries = int(line["total_q"]) // int(line["batch"])
    default_m = int(line["default_tile"].split("x")[0])
    block_m, block_n = map(int, line["tile"].split("x"))
    default_a_head = math.ceil(queries / default_m)
    us, default_us, stock_us = (float(line[name]) for name in ("us", "default_us", "stock_us"))
    return Row(
        problem=tuple(line[name] for name in PROBLEM),
        op=line["direction"],
        layout=line["layout"],
        head_dim=int(line["head_dim"]),
        mask="causal" if line["causal"] == "True" else "full",
        block_m=block_m,
        block_n=block_n,
        queries=queries,
        rows=100 * math.ceil(queries / block_m) * block_m // (default_a_head * default_m),
        tiles=100 * int(line["batch"]) * int(line["heads"]) * default_a_head // SM_COUNT,
        default_tflops=1e3 * float(line["gflop"]) / default_us,
        tuned_tflops=1e3 * float(line["gflop"]) / us,
        speedup_over_stock=stock_us / us,
    )


def class_of(value: int, classes: tuple[tuple, ...]) -> tuple:
    return next(bounds for bounds in classes if inside(bounds, value))


def queries_class(queries: int) -> tuple:
    """Up to the next power of two."""
    exponent = min(queries.bit_length() - 1, LONGEST_CLASS)
    return 1 << exponent, MAX if exponent == LONGEST_CLASS else (2 << exponent) - 1


def gain(rows: list[Row]) -> float:
    return geometric_mean(row.speedup for row in rows)


def wins(rows: list[Row]) -> bool:
    speedups = [row.speedup for row in rows]
    return len(rows) >= PROBLEMS and gain(rows) >= GAIN and min(speedups) >= WORST


def cells(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        kind = (row.op, row.layout, row.head_dim, row.mask, row.block_m, row.block_n)
        box = (
            queries_class(row.queries),
            class_of(row.rows, ROWS_CLASSES),
            class_of(row.tiles, TILES_CLASSES),
        )
        found.setdefault((kind, box), []).append(row)
    return found


def rule(box: Box, rows: list[Row]) -> TileRule:
    measured = [row for row in rows if box.holds(row)]
    bounds = {
        f"{name}_{end}": None if bound == MAX else bound
        for name in ("queries", "rows", "tiles")
        for end, bound in zip(("low", "high"), getattr(box, name), strict=True)
    }
    return TileRule(
        box.op, box.layout, box.head_dim, box.mask, **bounds, block_m=box.block_m,
        block_n=box.block_n,
        beats_stock=box.beats_stock, problems=len(measured),
        default_tflops=round(geometric_mean(row.default_tflops for row in measured), 1),
        tuned_tflops=round(geometric_mean(row.tuned_tflops for row in measured), 1),
        worst_speedup=round(min(row.speedup for row in measured), 3),
        worst_speedup_over_stock=round(min(row.speedup_over_stock for row in measured), 3),
    )  # fmt: skip


def chosen(rows: Iterable[Row]) -> list[Box]:
    """The boxes of the candidates that win there, but for those that win only where another one
    gains more."""
    winning = sorted(
        (item for item in cells(rows).items() if wins(item[1])), key=lambda item: -gain(item[1])
    )
    boxes, served = [], set()
    for (kind, box), measured in winning:
        if wins([row for row in measured if row.problem not in served]):
            boxes.append(Box(*kind, min(row.speedup_over_stock for row in measured) >= 1, *box))
            served |= {row.problem for row in measured}
    return boxes


def fit(rows: list[Row]) -> tuple[TileRule, ...]:
    """The rules, of a kind of call the one that gains most first: the first that holds for a
    problem is its."""
    rules = [rule(box, rows) for box in merged(chosen(rows))]
    return tuple(
        sorted(
            rules,
            key=lambda r: (r.op, r.layout, r.head_dim, r.mask, r.default_tflops / r.tuned_tflops),
        )
    )


def main() -> None:
    rules = fit(read())
    tile_rules.write(rules)
    tuned = sum(kernel.tuned for kernel in matrix())
    print(
        f"{len(rules)} rules from {MEASURED.name} in {tile_rules.TABLE.name}; a wheel holds "
        f"{tuned} kernels for them"
    )
    for r in rules:
        print(f"  {r.op} {r.layout} D{r.head_dim} {r.mask} {r.block_m}x{r.block_n}: "
            f"{r.tuned_tflops / r.default_tflops:.3f}x, "
              f"at worst {r.worst_speedup:.3f}x; {r.worst_speedup_over_stock:.2f}x stock's speed")  # fmt: skip


if __name__ == "__main__":
    main()
