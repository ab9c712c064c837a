"""A sliding window's bounds, which are run-time values."""

from typing import NamedTuple

from cutlass import Int32


class Window(NamedTuple):
    """Keys that a query sees: so many to the left of its own position, so many to the right."""

    left: Int32
    right: Int32
