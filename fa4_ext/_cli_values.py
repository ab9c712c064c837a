"""This module reads the values of options from a command line. Errors say what is allowed."""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError

_SHAPES = (
    "batch x heads x length x head_dim, such as 2x16x4096x128, or tokens x heads x head_dim, such "
    "as 8192x16x128"
)


def shape(text: str) -> tuple[int, ...]:
    """Reads a shape such as 2x16x4096x128, also as torch prints it, [2, 16, 4096, 128]."""
    if not re.fullmatch(
        r"\d+(x\d+){2,3}", compact := re.sub(r"[,*X]", "x", re.sub(r"[\s()\[\]]", "", text))
    ):
        raise ArgumentTypeError(f"{text!r} is not {_SHAPES}")
    sizes = tuple(int(size) for size in compact.split("x"))
    if too_large(sizes):
        raise ArgumentTypeError(
            f"{text!r} has more elements than a tensor can: at most 2**60 are allowed"
        )
    return sizes


def too_large(sizes: tuple[int, ...]) -> bool:
    return math.prod(max(size, 1) for size in sizes) >= 2**60


def count(text: str) -> int:
    if not re.fullmatch(r"\d{1,12}", text) or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def window(text: str) -> tuple[int, int]:
    """Reads LEFT,RIGHT. A bound of -1 means that there is none."""
    if not (match := re.fullmatch(r"(all|-1|\d{1,12}),(all|-1|\d{1,12})", text.replace(" ", ""))):
        raise ArgumentTypeError(
            f"{text!r} is not LEFT,RIGHT, such as 1024,0: each a number from 0 on, or all for no "
            "bound"
        )
    left, right = (-1 if bound == "all" else int(bound) for bound in match.groups())
    return left, right


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text!r} is not a probability from 0 to 1")
    return value


def capability(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(?:sm_?)?([1-9]\d?)\.?(\d)[af]?", text.lower())):
        raise ArgumentTypeError(f"{text!r} is not a device such as sm90, sm100 or sm103")
    return int(match[1]), int(match[2])
