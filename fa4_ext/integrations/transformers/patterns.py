"""This module recognises which pattern a mask function of Hugging Face transformers describes.

transformers composes mask functions from closures. A closure is recognised by its code object and
by what it holds; a function that is not one of those known has no pattern, and needs a dense mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import masking_utils

MaskFunction = Callable[..., torch.Tensor]


class Pattern(NamedTuple):
    """Which keys a query sees: those that every part of the pattern allows.

    Attributes:
        left: how many keys before its own position a query sees; None means all.
        right: how many keys behind its own position a query sees; None means all. 0 is causal.
        chunk: the length of the chunks, of which a query sees its own; None without chunks.
        chunk_starts: (batch,), where the first chunk of each row starts.
        positions: (batch, length), the positions that `left` and `right` count in, where they are
            not those in the row.
        sequences: (batch, length), numbers; a query sees the keys with its own number.
    """

    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    chunk_starts: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    sequences: torch.Tensor | None = None

    @property
    def is_relative(self) -> bool:
        """Returns whether what a query sees depends on its own position."""
        return self.left is not None or self.right is not None


FULL = Pattern()
CAUSAL = Pattern(right=0)


def recognised(mask_function: MaskFunction) -> Pattern | None:
    """Returns the pattern of a mask function, or None for one that is not known."""
    if mask_function is masking_utils.causal_mask_function:
        return CAUSAL
    if mask_function is masking_utils.bidirectional_mask_function:
        return FULL
    read = _READERS.get(getattr(mask_function, "__code__", None))
    return None if read is None else read(_contents(mask_function))


def _contents(closure: Any) -> dict[str, Any]:
    """Returns what the closure holds, by name."""
    cells = (cell.cell_contents for cell in closure.__closure__)
    return dict(zip(closure.__code__.co_freevars, cells, strict=True))


def _read_all(held: dict[str, Any]) -> Pattern | None:
    together: Pattern | None = FULL
    for part in held["mask_functions"]:
        together = _both(together, recognised(part))
    return together


def _both(one: Pattern | None, other: Pattern | None) -> Pattern | None:
    """Returns the pattern that allows what both allow, or None where no `Pattern` describes it."""
    if (
        one is None
        or other is None
        or any(_in_two_numberings(*pair) for pair in zip(one, other, strict=True))
    ):
        return None
    if (_moved(one) and _counts(other)) or (_moved(other) and _counts(one)):
        return None
    left, right = (_narrower(*pair) for pair in ((one.left, other.left), (one.right, other.right)))
    rest = (b if a is None else a for a, b in zip(one[2:], other[2:], strict=True))
    return Pattern(left, right, *rest)


def _in_two_numberings(one: Any, other: Any) -> bool:
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)


def _moved(pattern: Pattern) -> bool:
    return pattern.positions is not None


def _counts(pattern: Pattern) -> bool:
    return pattern.is_relative or pattern.chunk is not None


def _narrower(one: int | None, other: int | None) -> int | None:
    given = [bound for bound in (one, other) if bound is not None]
    return min(given) if given else None


def _read_window(held: dict[str, Any]) -> Pattern | None:
    window = held["sliding_window"]
    return Pattern(left=window - 1) if isinstance(window, int) and window > 0 else None


def _read_window_both_ways(held: dict[str, Any]) -> Pattern | None:
    window = held["sliding_window"]
    return Pattern(window, window) if isinstance(window, int) and window >= 0 else None


def _read_chunks(held: dict[str, Any]) -> Pattern | None:
    return Pattern(chunk=held["chunk_size"], chunk_starts=held["left_padding"])


def _read_moved(held: dict[str, Any]) -> Pattern | None:
    inner = recognised(held["mask_function"])
    if inner is None or inner.chunk is not None or _moved(inner) or inner.sequences is not None:
        return None
    return inner._replace(positions=held["position_ids"])


def _read_sequences(held: dict[str, Any]) -> Pattern | None:
    return Pattern(sequences=held["packed_sequence_mask"])


_NOTHING = torch.zeros(1)
_READERS: dict[Any, Callable[[dict[str, Any]], Pattern | None]] = {
    made.__code__: read  # type: ignore[attr-defined]
    for made, read in (
        (masking_utils.and_masks(), _read_all),
        (masking_utils.sliding_window_overlay(1), _read_window),
        (masking_utils.sliding_window_bidirectional_overlay(1), _read_window_both_ways),
        (masking_utils.chunked_overlay(1, _NOTHING), _read_chunks),
        (
            masking_utils.remap_positions_for_packed_sequence(
                masking_utils.causal_mask_function, _NOTHING
            ),
            _read_moved,
        ),
        (masking_utils.packed_sequence_mask_function(_NOTHING), _read_sequences),
    )
}
