"""Where another tile than the default was measured to be faster: the rows of tile_rules.csv, which
the planner follows.

`python -m benchmarks.fit_tile_rules` writes them. Their tiles are the only candidates of
kernels/matrix.py that a wheel holds.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

TABLE = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True)
class TileRule:
    """A box in the features of a problem (csrc/core/plan/tile_rules.h), the tile that it gets,
    and what was measured in it. Bounds are included; an empty upper one is none."""

    op: str
    layout: str
    head_dim: int  # bucket, of query's and value's
    mask: str
    queries_low: int
    queries_high: int | None
    rows_low: int
    rows_high: int | None
    tiles_low: int
    tiles_high: int | None
    block_m: int
    block_n: int
    beats_stock: bool
    problems: int  # that were measured in the box
    default_tflops: float  # geometric means over these
    tuned_tflops: float
    worst_speedup: float  # over the default
    worst_speedup_over_stock: float


PARSE = {
    "str": str,
    "int": int,
    "int | None": lambda text: int(text) if text else None,
    "float": float,
    "bool": lambda text: text == "True",
}


def read(path: Path = TABLE) -> tuple[TileRule, ...]:
    parse = {field.name: PARSE[field.type] for field in fields(TileRule)}
    with open(path, newline="") as file:
        return tuple(
            TileRule(**{name: parse[name](text) for name, text in row.items()})
            for row in csv.DictReader(file)
        )


def write(rules: Iterable[TileRule], path: Path = TABLE) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(
            file, [field.name for field in fields(TileRule)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(map(vars, rules))
