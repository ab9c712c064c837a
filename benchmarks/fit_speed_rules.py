"""Fits the planner's speed rules to measurements, and says what they cost: `python -m
benchmarks.fit_speed_rules`.

The measurements, benchmarks/results/h200_rules.csv, come from `python -m benchmarks.rules --csv
PATH`. A rule is a box in the features of a problem in which the stock kernel was measured to be
faster somewhere; between two measured points the boundary is drawn at the one that ours won. So a
few problems in the boxes would be faster on ours: the command counts them.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from itertools import combinations
from pathlib import Path

MEASURED = Path(__file__).parent / "results" / "h200_rules.csv"
RULES = Path(__file__).parent.parent / "csrc" / "core" / "plan" / "speed_rules.inc"
NOISE = 1.05  # a ratio up to it counts as equal
MAX = math.inf


@dataclass(frozen=True)
class Row:
    op: str
    layout: str
    head_dim: int
    heads: str  # equal, grouped
    batch: int
    queries: int
    keys: int
    ratio: float  # our time over stock's


@dataclass(frozen=True)
class Rule:
    op: str
    layout: str
    head_dim: int
    heads: str  # equal, grouped
    queries: tuple = (0, MAX)
    keys: tuple = (0, MAX)
    batch: tuple = (0, MAX)

    def holds(self, row: Row) -> bool:
        ranges = (
            (self.queries, row.queries),
            (self.keys, row.keys),
            (self.batch, row.batch),
        )
        same = (self.op, self.layout, self.head_dim) == (row.op, row.layout, row.head_dim)
        return same and self.heads == row.heads and all(a <= value <= b for (a, b), value in ranges)

    def cpp(self) -> str:
        op, layout, head_dim, heads, *ranges = astuple(self)
        bounds = ", ".join(f"{{{low}, {'kMax' if high == MAX else high}}}" for low, high in ranges)
        return (
            f"{{Op::k{op.title()}, Layout::k{layout.title()}, {head_dim}, Heads::k{heads.title()}, "
            f"{bounds}}},"
        )


def read(path: Path) -> list[Row]:
    rows = []
    with open(path) as file:
        for line in csv.DictReader(file):
            # which no rule turns down: docs/kernels-sm90.md has its measurements
            if line["kernel"] == "decode":
                continue
            get = {
                name: int(line[name])
                for name in (
                    "head_dim",
                    "heads",
                    "heads_kv",
                    "batch",
                    "seqlen_q",
                    "seqlen_k",
                    "total_q",
                    "longest",
                )
            }
            op, layout = line["kernel"], line["layout"]
            queries = get["total_q"] // get["batch"]
            rows.append(Row(
                op, layout, get["head_dim"],
                "equal" if get["heads"] == get["heads_kv"] else "grouped", get["batch"], queries,
                get["longest"] if layout == "varlen" else get["seqlen_k"],
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
        # a single value that ours won between two that it lost is luck
        if ranges and ranges[-1][1] >= low - 2:
            ranges[-1][1] = high
        else:
            ranges.append([low, high])
    return [tuple(bounds) for bounds in ranges]


def classes(values: Iterable[int]) -> list[tuple]:
    """Consecutive ranges, each from one measured value up to the next."""
    ordered = sorted(set(values))
    return [
        (0 if i == 0 else value, ordered[i + 1] - 1 if i + 1 < len(ordered) else MAX)
        for i, value in enumerate(ordered)
    ]


def inside(bounds: tuple, value: int) -> bool:
    return bounds[0] <= value <= bounds[1]


def backwards(rows: list[Row], layout: str) -> Iterable[tuple[int, str, list[Row]]]:
    """By head dim and heads, the rows that rules are fitted to together."""
    for head_dim in sorted({row.head_dim for row in rows}):
        for heads in ("equal", "grouped"):
            kind = ("backward", layout, head_dim, heads)
            yield (
                head_dim,
                heads,
                [row for row in rows if (row.op, row.layout, row.head_dim, row.heads) == kind],
            )


def dense_backward(rows: list[Row]) -> Iterable[Rule]:
    """Few queries against many keys: clearing and converting the accumulators of dK and dV of
    grouped heads takes the time."""
    for head_dim, heads, here in backwards(rows, "dense"):
        for queries in ((0, 128), (129, 256), (257, MAX)):
            for keys in lost(
                (row for row in here if inside(queries, row.queries)), lambda row: row.keys
            ):
                yield Rule("backward", "dense", head_dim, heads, queries=queries, keys=keys)


def varlen_backward(rows: list[Row]) -> Iterable[Rule]:
    """Sequences shorter than a tile waste it, and every block looks for its sequence among all."""
    for head_dim, heads, here in backwards(rows, "varlen"):
        for queries in classes(1 << (row.queries.bit_length() - 1) for row in here):
            for batch in lost(
                (row for row in here if inside(queries, row.queries)), lambda row: row.batch
            ):
                yield Rule("backward", "varlen", head_dim, heads, queries=queries, batch=batch)


def merged(rules: list) -> list:
    """Boxes, dataclasses whose ranges are pairs, that touch along one and agree in everything else,
    as one."""
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
    """None of a forward: on the rows that stock runs faster it does by little, and they are no
    box."""
    return merged([*dense_backward(rows), *varlen_backward(rows)])


def render(rules: list[Rule]) -> str:
    header = (
        "// Written by benchmarks/fit_speed_rules.py. Heads; queries, keys, batch: see "
        "StockIsFaster.\n"
    )
    return header + "".join(rule.cpp() + "\n" for rule in rules)


def main() -> None:
    rows = read(MEASURED)
    rules = fit(rows)
    RULES.write_text(render(rules))
    left = {row for row in rows if any(rule.holds(row) for rule in rules)}
    taken = [row for row in rows if row not in left]
    print(
        f"{len(rules)} rules; stock gets {len(rows) - len(taken)} of {len(rows)} measured problems"
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
