"""The planner's rules, which are measurements as data.

A rule is a box in the features of a problem: it holds for the problems of one kind whose features
lie in its ranges. tile_rules.csv says where another tile than the default was measured to be
faster, and with which tile; `python -m tuning.fit_tiles` writes it. Its tiles are the only
candidates of kernels/matrix.py that a wheel holds. speed_rules.csv says where the peer, which is
PyTorch's flash attention or cuDNN, was measured to be faster; `python -m tuning.fit_stock` writes
it. kernels/table.py turns both into C++, and csrc/core/plan/problem_features.h says what the
features are.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TypeVar

TILE_RULES = Path(__file__).with_name("tile_rules.csv")
SPEED_RULES = Path(__file__).with_name("speed_rules.csv")

Range = tuple[float, float]  # both bounds are included; the upper one may be infinite
ANY: Range = (0, math.inf)


@dataclass(frozen=True)
class Rule:
    """A box. A selector that is None selects everything."""

    op: str
    layout: str
    head_dim: int  # bucket of query's
    mask: str | None = None
    grouped: bool | None = None  # GQA and MQA; False: MHA
    head_dim_v: int | None = None  # bucket of value's
    peer: str | None = None  # flash or cudnn: which op's calls
    queries: Range = ANY
    keys: Range = ANY
    batch: Range = ANY
    rows: Range = ANY
    tiles: Range = ANY

    def holds(self, problem) -> bool:
        """Whether the rule holds for a problem, which has the features that the rule restricts as
        attributes."""
        return all(
            getattr(self, name) is None or getattr(self, name) == getattr(problem, name)
            for name in SELECTORS
        ) and all(
            getattr(self, name) == ANY or inside(getattr(self, name), getattr(problem, name))
            for name in FEATURES
        )


SELECTORS = ("op", "layout", "head_dim", "mask", "grouped", "head_dim_v", "peer")
FEATURES = ("queries", "keys", "batch", "rows", "tiles")


@dataclass(frozen=True, kw_only=True)
class TileRule(Rule):
    """A box, the tile that is faster in it, and what was measured there."""

    block_m: int
    block_n: int
    beats_stock: bool
    problems: int  # that were measured in the box
    default_tflops: float  # geometric means over these
    tuned_tflops: float
    worst_speedup: float  # over the default
    worst_speedup_over_stock: float


def inside(bounds: Range, value: float) -> bool:
    return bounds[0] <= value <= bounds[1]


def tile_rules() -> tuple[TileRule, ...]:
    return read(TileRule, TILE_RULES)


def speed_rules() -> tuple[Rule, ...]:
    return read(Rule, SPEED_RULES)


def _range(text: str) -> Range:
    low, high = text.split("..")
    return int(low), int(high) if high else math.inf


_PARSE: dict[str, Callable] = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "float": float,
    "bool": lambda text: text == "True",
    "bool | None": lambda text: text == "True",
    "Range": _range,
}
R = TypeVar("R", bound=Rule)


def _text(value) -> str:
    """The text of a cell: 256..511 for a range, 256.. for one without an upper bound."""
    if not isinstance(value, tuple):
        return str(value)
    low, high = value
    return f"{low}..{'' if high == math.inf else high}"


def read(kind: type[R], path: Path) -> tuple[R, ...]:
    """The rules in a file. An empty cell, like a column that the file lacks, is the default."""
    parse = {field.name: _PARSE[str(field.type)] for field in fields(kind)}
    with open(path, newline="") as file:
        return tuple(
            kind(**{name: parse[name](text) for name, text in line.items() if text})
            for line in csv.DictReader(file)
        )


def write(kind: type[R], rules: Iterable[R], path: Path) -> None:
    """Writes the rules with the columns in which one of them differs from the default."""
    rules = tuple(rules)
    defaults = {field.name: field.default for field in fields(kind)}
    columns = [
        name
        for name, default in defaults.items()
        if default is MISSING or any(getattr(rule, name) != default for rule in rules)
    ]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for rule in rules:
            values = {name: getattr(rule, name) for name in columns}
            writer.writerow(
                "" if value == defaults[name] else _text(value) for name, value in values.items()
            )
