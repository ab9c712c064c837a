"""This module describes the rows of a batch as packed sequences.

Nothing is gathered: the batch is flattened, and the sequences cover all of it. A run of keys that
nobody sees is a sequence without queries, and a run of queries of padding one without keys, whose
output is zero. What has to be read from the device is read at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch

# The numbers of queries and of keys of a sequence.
Length = tuple[int, int]


class Rows(NamedTuple):
    """The rows of a batch as packed sequences: the arguments of `flash_attn_varlen_func`."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Padding(NamedTuple):
    """Where the keys that are no padding lie in each row.

    Attributes:
        runs: the first one, and the one behind the last one; 0 and 0 in a row without any.
        contiguous: whether all keys between them are no padding, in every row.
        others: the further numbers of each row that were read along.
    """

    runs: list[tuple[int, int]]
    contiguous: bool
    others: list[list[int]]


def read_padding(visible_keys: torch.Tensor, *others: torch.Tensor) -> Padding:
    """Reads where the keys lie that are no padding, with one synchronisation.

    Args:
        visible_keys: (batch, kv_length), bool.
        others: (batch,) or (), further numbers to read.
    """
    batch, kv_length = visible_keys.shape
    visible = visible_keys.int()
    count = visible.sum(1)
    first = visible.argmax(1)
    end = (kv_length - visible.flip(1).argmax(1)).where(count > 0, 0)
    found = torch.stack([first, end, count, *(other.expand(batch) for other in others)])
    firsts, ends, counts, *more = found.tolist()
    runs = list(zip(firsts, ends, strict=True))
    contiguous = all(b - a == n for (a, b), n in zip(runs, counts, strict=True))
    return Padding(runs, contiguous, more)


def read_packed(sequences: torch.Tensor, positions: torch.Tensor) -> list[list[int]] | None:
    """Reads how long the sequences in each row are, with one synchronisation.

    Args:
        sequences: (batch, length), each token's sequence.
        positions: (batch, length), each token's position.

    Returns:
        The lengths in each row, or None if a sequence's tokens do not follow each other, or their
        positions do not.
    """
    starts = torch.diff(sequences, dim=1).sign()
    astray = (starts == 0) & (torch.diff(positions, dim=1) != 1)
    steps = torch.where(astray, -1, starts).to(torch.int8).cpu()
    if (steps < 0).any():
        return None
    return [_gaps([0, *(row.nonzero()[:, 0] + 1).tolist(), sequences.shape[1]]) for row in steps]


def chunks(length: int, chunk: int) -> list[int]:
    """Returns the lengths of the chunks of a row."""
    return _gaps([*range(0, length, chunk), length])


def _gaps(bounds: list[int]) -> list[int]:
    return [b - a for a, b in pairwise(bounds)]


def of_sequences(lengths: Iterable[int], device: torch.device) -> Rows:
    """Returns the rows of self attention, where each sequence sees itself."""
    return _rows([(length, length) for length in lengths], device)


def of_all_queries(
    padding: Padding, q_length: int, kv_length: int, device: torch.device, *, in_static_cache: bool
) -> Rows:
    """Returns rows in which all queries of a row see all its keys that are no padding.

    The last query has the position of the last of these keys. In a static cache the number of
    sequences and the longest ones stay the same while it fills, so that a graph need not be
    compiled again.
    """
    lengths = [
        part for a, b in padding.runs for part in ((0, a), (q_length, b - a), (0, kv_length - b))
    ]
    if not in_static_cache:
        return _rows(lengths, device)
    return Rows(*_bounds(lengths, device), q_length, kv_length)


def of_self_attention(padding: Padding, length: int, device: torch.device) -> Rows:
    """Returns rows in which the queries up to the last one that is no padding see the keys that
    are no padding, at their positions, and the queries behind it see nothing.
    """
    lengths = [
        part
        for a, b in padding.runs
        for part in ((0, a), (b, b - a), (length - b, 0), (0, length - b))
    ]
    return _rows(lengths, device)


def _rows(lengths: list[Length], device: torch.device) -> Rows:
    """Returns sequences of these lengths, without those that have neither queries nor keys."""
    kept = [pair for pair in lengths if any(pair)]
    longest_q, longest_k = map(max, zip(*kept, strict=True))
    return Rows(*_bounds(kept, device), longest_q, longest_k)


def _bounds(lengths: list[Length], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor([(0, 0), *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    cu_seqlens_q, cu_seqlens_k = both.T.contiguous().to(device, non_blocking=True)
    return cu_seqlens_q, cu_seqlens_k
