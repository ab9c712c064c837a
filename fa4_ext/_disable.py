"""This module reads the patterns of kernels that a registration leaves out."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from fa4_ext import _library

_HOW_TO_LIST = "`python -m fa4_ext kernels` lists their names"


def check(patterns) -> tuple[str, ...]:
    """Returns the patterns of an argument `disable`, each once.

    Raises:
        ValueError: it is something else than a tuple or a list of patterns, or one of them matches
            no kernel of this build.
    """
    if not isinstance(patterns, (tuple, list)) or not all(
        isinstance(pattern, str) and re.fullmatch(r"[^\s,]+", pattern) for pattern in patterns
    ):
        raise ValueError(
            "disable must be a tuple of kernels' names, or patterns of them such as "
            f"'sm90_decode_*', without spaces or commas, got {patterns!r}"
        )
    if unknown := _unknown(tuple(patterns)):
        raise ValueError(
            f"disable names {', '.join(map(repr, unknown))}, which no kernel of this build "
            f"matches: {_HOW_TO_LIST}"
        )
    return tuple(dict.fromkeys(patterns))


def from_environment(value: str | None) -> tuple[tuple[str, ...], str | None]:
    """Returns the patterns in this value of FA4_EXT_DISABLE that match a kernel of this build, and
    the sentence about those that match none, or None. Commas and spaces separate patterns.

    Raises:
        RuntimeError: there are patterns, and the native library could not be loaded.
    """
    patterns = tuple(dict.fromkeys(filter(None, re.split(r"[\s,]+", value or ""))))
    unknown = _unknown(patterns)
    if not unknown:
        return patterns, None
    return tuple(pattern for pattern in patterns if pattern not in unknown), (
        f"FA4_EXT_DISABLE names {', '.join(map(repr, unknown))}, which no kernel of this build "
        f"matches: {_HOW_TO_LIST}."
    )


def _unknown(patterns: tuple[str, ...]) -> list[str]:
    if not patterns:
        return []
    names = {kernel["name"] for kernel in _library.manifest()}
    return [
        pattern
        for pattern in patterns
        if pattern not in names and not any(fnmatchcase(name, pattern) for name in names)
    ]
