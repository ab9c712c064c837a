"""Defines the features of a measured problem and the boxes in these features, which both fits
use."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import TypeVar

from kernels.rules import Range, Rule, inside

R = TypeVar("R", bound=Rule)


@dataclass(frozen=True)
class Features:
    """The features of a measured problem, named as in kernels/rules.py."""

    op: str
    layout: str
    head_dim: int
    mask: str
    grouped: bool
    batch: int
    queries: int
    keys: int


def features(line: dict[str, str]) -> dict:
    """Returns the features of a line of a CSV file, as csrc/core/plan/problem_features.h computes
    them."""
    varlen = line["layout"] == "varlen"
    return dict(
        op=line["direction"],
        layout=line["layout"],
        head_dim=int(line["head_dim"]),
        mask="causal" if line["causal"] == "True" else "full",
        grouped=line["heads"] != line["heads_kv"],
        batch=int(line["batch"]),
        queries=int(line["total_q"]) // int(line["batch"]),
        keys=int(line["longest"] if varlen else line["seqlen_k"]),
    )


def classes(values: Iterable[int]) -> list[Range]:
    """Returns consecutive ranges, one from each of the values up to the next. The first begins at
    0, the last has no end."""
    ordered = sorted(set(values))
    return [
        (0 if i == 0 else value, ordered[i + 1] - 1 if i + 1 < len(ordered) else math.inf)
        for i, value in enumerate(ordered)
    ]


def class_of(value: int, bounds: Iterable[Range]) -> Range:
    return next(one for one in bounds if inside(one, value))


def merged(rules: list[R]) -> list[R]:
    """Returns the rules; two that agree in everything but one range, and touch in that, are
    joined."""
    for (i, a), (j, b) in combinations(enumerate(rules), 2):
        different = [f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)]
        if len(different) != 1 or not isinstance(getattr(a, different[0]), tuple):
            continue
        (low, end), (begin, high) = sorted((getattr(a, different[0]), getattr(b, different[0])))
        if begin == end + 1:
            one = replace(a, **{different[0]: (low, high)})
            return merged([*rules[:i], one, *rules[i + 1 : j], *rules[j + 1 :]])
    return rules
