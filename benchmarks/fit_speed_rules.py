"""Fits the planner's speed rules to measurements, and says what they cost: `python -m benchmarks.fit_speed_rules`.

The measurements, benchmarks/results/h200_rules.csv, come from `python -m benchmarks.rules --csv PATH`. A rule is
a box in the features of a problem in which the stock kernel was measured to be faster somewhere; between two measured points the
boundary is drawn at the one that ours won. So a few problems in the boxes would be faster on ours: the command counts them.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from itertools import combinations
from pathlib import Path

from kernels.matrix import Mask, matrix

MEASURED = Path(__file__).parent / "results" / "h200_rules.csv"
RULES = Path(__file__).parent.parent / "csrc" / "core" / "speed_rules.inc"
SM_COUNT = 132  # of the device that was measured
# Rows of a query tile, by op, layout, head dim and whether the mask is causal.
BLOCK_M = {
    (k.op.value, k.layout.value, k.head_dim, k.mask is Mask.CAUSAL): k.block_m
    for k in matrix()
    if k.arch == 90 and k.mask is not Mask.WINDOW and not k.tuned
}
NOISE = 1.05  # a ratio up to it counts as equal
MANY_QUERIES = 128  # of a dense forward: no problem with so many was faster on the stock kernel since ours is persistent
MAX = math.inf
FILL_CLASSES = ((0, 25), (26, 50), (51, 75), (76, 100))


@dataclass(frozen=True)
class Row:
    op: str
    layout: str
    head_dim: int
    grouped: bool
    batch: int
    queries: int
    keys: int
    fill: int
    tiles: int
    ratio: float  # our time over stock's


@dataclass(frozen=True)
class Rule:
    op: str
    layout: str
    head_dim: int
    heads: str  # any, equal, grouped
    queries: tuple = (0, MAX)
    fill: tuple = (0, MAX)
    tiles: tuple = (0, MAX)
    keys: tuple = (0, MAX)
    batch: tuple = (0, MAX)

    def holds(self, row: Row) -> bool:
        ranges = (
            (self.queries, row.queries),
            (self.fill, row.fill),
            (self.tiles, row.tiles),
            (self.keys, row.keys),
            (self.batch, row.batch),
        )
        same = (self.op, self.layout, self.head_dim) == (row.op, row.layout, row.head_dim)
        return (
            same
            and self.heads in ("any", "grouped" if row.grouped else "equal")
            and all(a <= value <= b for (a, b), value in ranges)
        )

    def cpp(self) -> str:
        op, layout, head_dim, heads, *ranges = astuple(self)
        bounds = ", ".join(f"{{{low}, {'kMax' if high == MAX else high}}}" for low, high in ranges)
        return f"{{Op::k{op.title()}, Layout::k{layout.title()}, {head_dim}, Heads::k{heads.title()}, {bounds}}},"


def read(path: Path) -> list[Row]:
    rows = []
    with open(path) as file:
        for line in csv.DictReader(file):
            if line["kernel"] == "decode":  # which no rule turns down: docs/kernels-sm90.md has its measurements
                continue
            get = {
                name: int(line[name])
                for name in ("head_dim", "heads", "heads_kv", "batch", "seqlen_q", "seqlen_k", "total_q", "longest")
            }
            op, layout = line["kernel"], line["layout"]
            queries = get["total_q"] // get["batch"]
            block_m = BLOCK_M[op, layout, get["head_dim"], line["causal"] == "True"]
            tiles_a_head = -(-queries // block_m)
            rows.append(Row(
                op, layout, get["head_dim"], get["heads"] != get["heads_kv"], get["batch"], queries,
                get["longest"] if layout == "varlen" else get["seqlen_k"],
                100 * queries // (tiles_a_head * block_m),
                100 * get["batch"] * get["heads"] * tiles_a_head // SM_COUNT,
                float(line["ours_us"]) / float(line["stock_us"]),
            ))  # fmt: skip
    return rows


def lost(rows: Iterable[Row], feature: Callable[[Row], int]) -> list[tuple]:
    """Ranges of the feature in which ours is slower on some row."""
    worst: dict[int, float] = {}
    for row in rows:
        worst[feature(row)] = max(worst.get(feature(row), 0.0), row.ratio)
    values = sorted(worst)
    ranges: list[list] = []
    for i, value in enumerate(values):
        if worst[value] <= NOISE:
            continue
        low = values[i - 1] + 1 if i else 0
        high = values[i + 1] - 1 if i + 1 < len(values) else MAX
        if ranges and ranges[-1][1] >= low - 2:  # a single value that ours won between two that it lost is luck
            ranges[-1][1] = high
        else:
            ranges.append([low, high])
    return [tuple(bounds) for bounds in ranges]


def classes(values: Iterable[int]) -> list[tuple]:
    """Consecutive ranges, each from one measured value up to the next."""
    ordered = sorted(set(values))
    return [(0 if i == 0 else value, ordered[i + 1] - 1 if i + 1 < len(ordered) else MAX) for i, value in enumerate(ordered)]


def inside(bounds: tuple, value: int) -> bool:
    return bounds[0] <= value <= bounds[1]


def dense_forward(rows: list[Row]) -> Iterable[Rule]:
    """Few tiles of queries leave multiprocessors idle; the stock kernel splits the keys, and packs the heads of single queries."""
    for head_dim in sorted({row.head_dim for row in rows}):
        here = [row for row in rows if (row.op, row.layout, row.head_dim) == ("forward", "dense", head_dim)]
        if slower := [row for row in here if row.queries >= MANY_QUERIES and row.ratio > NOISE]:
            raise ValueError(f"stock is faster with {MANY_QUERIES} queries or more, which no rule is for: {slower}")
        here = [row for row in here if row.queries < MANY_QUERIES]
        yield Rule("forward", "dense", head_dim, "grouped", queries=(0, 1))
        packed = [row for row in here if not (row.grouped and row.queries == 1)]
        steps = {
            *(row.tiles for row in packed if row.tiles < 100),
            100,
            200,
            400,
        }  # from 400 on, a partial last wave matters little
        known: dict[tuple, list[tuple]] = {}  # lost keys by tiles, of the fill class before and then of this one
        for fill in FILL_CLASSES:
            fewer_tiles = None
            for tiles in classes(max(step for step in steps if step <= row.tiles) for row in packed):
                measured = [row for row in packed if inside(tiles, row.tiles) and inside(fill, row.fill)]
                if measured:
                    fewer_tiles = known[tiles] = lost(measured, lambda row: row.keys)
                elif fewer_tiles is not None:  # more tiles do no worse
                    known[tiles] = fewer_tiles
                for keys in known.get(tiles, [(0, MAX)]):  # nor do fuller ones
                    yield Rule("forward", "dense", head_dim, "any", (0, MANY_QUERIES - 1), fill, tiles, keys)


def dense_backward(rows: list[Row]) -> Iterable[Rule]:
    """Few queries against many keys: clearing and converting the accumulators of dK and dV of grouped heads takes the time."""
    for head_dim in sorted({row.head_dim for row in rows}):
        for grouped in (False, True):
            here = [
                row for row in rows if (row.op, row.layout, row.head_dim, row.grouped) == ("backward", "dense", head_dim, grouped)
            ]
            for queries in ((0, 128), (129, 256), (257, MAX)):
                for keys in lost((row for row in here if inside(queries, row.queries)), lambda row: row.keys):
                    yield Rule("backward", "dense", head_dim, "grouped" if grouped else "equal", queries=queries, keys=keys)


def varlen(rows: list[Row]) -> Iterable[Rule]:
    """Sequences shorter than a tile waste it, and every block looks for its sequence among all."""
    for op in ("forward", "backward"):
        for head_dim in sorted({row.head_dim for row in rows}):
            for grouped in (False, True):
                here = [row for row in rows if (row.op, row.layout, row.head_dim, row.grouped) == (op, "varlen", head_dim, grouped)]
                for queries in classes(1 << (row.queries.bit_length() - 1) for row in here):
                    for batch in lost((row for row in here if inside(queries, row.queries)), lambda row: row.batch):
                        yield Rule(op, "varlen", head_dim, "grouped" if grouped else "equal", queries=queries, batch=batch)


def merged(rules: list) -> list:
    """Boxes, dataclasses whose ranges are pairs, that touch along one and agree in everything else, as one."""
    for (i, a), (j, b) in combinations(enumerate(rules), 2):
        fields_a, fields_b = astuple(a), astuple(b)
        different = [n for n, (x, y) in enumerate(zip(fields_a, fields_b, strict=True)) if x != y]
        if len(different) != 1 or not isinstance(fields_a[different[0]], tuple):
            continue
        (low, end), (begin, high) = sorted((fields_a[different[0]], fields_b[different[0]]))
        if begin == end + 1:
            one = type(a)(*fields_a[: different[0]], (low, high), *fields_a[different[0] + 1 :])
            return merged([*rules[:i], one, *rules[i + 1 : j], *rules[j + 1 :]])
    return rules


def fit(rows: list[Row]) -> list[Rule]:
    return merged([*dense_forward(rows), *dense_backward(rows), *varlen(rows)])


def render(rules: list[Rule]) -> str:
    header = "// Written by benchmarks/fit_speed_rules.py. Heads; queries, fill, tiles, keys, batch: see StockIsFaster.\n"
    return header + "".join(rule.cpp() + "\n" for rule in rules)


def main() -> None:
    rows = read(MEASURED)
    rules = fit(rows)
    RULES.write_text(render(rules))
    left = {row for row in rows if any(rule.holds(row) for rule in rules)}
    taken = [row for row in rows if row not in left]
    print(f"{len(rules)} rules; stock gets {len(rows) - len(taken)} of {len(rows)} measured problems")
    print(f"ours at worst {max(row.ratio for row in taken):.2f} times stock's time on the problems it takes")
    given_up = [row for row in left if row.ratio < 0.9]
    print(f"{len(given_up)} of those that stock gets would be faster on ours by a tenth or more")


if __name__ == "__main__":
    main()
