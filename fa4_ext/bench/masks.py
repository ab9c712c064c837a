"""Makes the masks that are measured as tensors, which F.scaled_dot_product_attention takes as
attn_mask."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fa4_ext.bench.shapes import Shape

# Under each but the first and the last, a query sees nothing behind itself. Padding is as encoders
# have it, on the right, and as batches of prompts have it, on the left; a query of the latter's
# padding sees itself. `slopes` hides nothing: ALiBi's slopes, of every head, and noise.
RIGHT, LEFT, CAUSAL, WINDOW, DOCUMENTS, PREFIX, SLOPES = KINDS = (
    "right padding", "left padding", "causal", "window", "documents", "prefix", "slopes",
)  # fmt: skip
PADDED = (RIGHT, LEFT)
WINDOW_SIZE = 1024  # keys that a query sees, its own among them
LEAST_PADDING, MOST_PADDING = 0.1, 0.5  # of a sequence's rows
SHORTEST, LONGEST = 512, 4096  # of documents; the last one is cut off
PREFIX_PART = 4  # a prefix is one in so many rows


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask's tensors.

    Attributes:
        kind: of KINDS.
        bias: [batch or 1, heads or 1, queries or 1, keys], in the dtype of q: what is added to the
            scores, minus infinity for what is hidden.
        first, end: the first key that a query sees, and the first one behind those, [batch or 1,
            queries or 1].
        cu_seqlens, longest: of packed sequences that amount to the same; None and 0 where none do.
    """

    kind: str
    bias: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor
    cu_seqlens: torch.Tensor | None
    longest: int


def rows_in_use(shape: Shape) -> list[slice]:
    """Returns the rows of each sequence that are no padding. The others' outputs mean nothing, and
    have no gradient."""
    if shape.mask not in PADDED:
        return [slice(None)] * shape.batch
    step = (MOST_PADDING - LEAST_PADDING) / shape.batch
    padding = [
        round(shape.seqlen_k * (LEAST_PADDING + step * (index + 0.5)))
        for index in range(shape.batch)
    ]
    return [
        slice(0, shape.seqlen_k - rows) if shape.mask == RIGHT else slice(rows, shape.seqlen_k)
        for rows in padding
    ]


def documents(seqlen: int) -> list[int]:
    """Returns the lengths of documents that follow each other, short ones being more frequent."""
    draw = random.Random(seqlen)
    lengths: list[int] = []
    while left := seqlen - sum(lengths):
        length = round(SHORTEST * (LONGEST / SHORTEST) ** draw.random())
        lengths.append(min(left, length))
    return lengths


def spans(shape: Shape, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `first` and `end` of a Mask."""
    row = torch.arange(shape.seqlen_q, device=device)[None]
    first, end = torch.zeros_like(row), row + 1
    if shape.mask in PADDED:
        in_use = torch.tensor([[r.start, r.stop] for r in rows_in_use(shape)], device=device)
        if shape.mask == RIGHT:
            return in_use[:, :1], in_use[:, 1:]
        first = torch.minimum(in_use[:, :1], row)
    elif shape.mask == WINDOW:
        first = (end - WINDOW_SIZE).clamp(min=0)
    elif shape.mask == DOCUMENTS:
        lengths = torch.tensor(documents(shape.seqlen_q), device=device)
        first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)[None]
    elif shape.mask == PREFIX:
        end = end.clamp(min=shape.seqlen_k // PREFIX_PART)
    elif shape.mask == SLOPES:
        return first[:, :1], end[:, -1:]
    return first, end


def pairs(shape: Shape) -> int:
    """Returns the pairs of a query and a key that it sees, of all sequences."""
    first, end = spans(shape)
    return int((end - first).expand(shape.batch, shape.seqlen_q).sum())


def packed_lengths(shape: Shape) -> tuple[int, ...]:
    """Returns the lengths of packed sequences. Padding becomes sequences of its own."""
    if shape.mask == DOCUMENTS:
        return tuple(documents(shape.seqlen_q)) * shape.batch
    if shape.mask not in PADDED:
        return ()
    splits = [r.stop if shape.mask == RIGHT else r.start for r in rows_in_use(shape)]
    return tuple(length for split in splits for length in (split, shape.seqlen_k - split))


def make_mask(shape: Shape, q: torch.Tensor) -> Mask | None:
    """Returns the mask of a problem for these queries, or None if it has none."""
    if not shape.mask:
        return None
    first, end = spans(shape, q.device)
    key = torch.arange(shape.seqlen_k, device=q.device)
    if shape.mask == SLOPES:
        bias = _slopes(shape, q)
    else:
        hidden = (key < first[..., None]) | (key >= end[..., None])
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill_(hidden, float("-inf"))[:, None]
    lengths = packed_lengths(shape)
    cu_seqlens = starts(lengths, q.device) if lengths else None
    return Mask(shape.mask, bias, first, end, cu_seqlens, max(lengths, default=0))


def _slopes(shape: Shape, q: torch.Tensor) -> torch.Tensor:
    size = (1, shape.heads, shape.seqlen_q, shape.seqlen_k)
    bias = torch.randn(*size, dtype=q.dtype, device=q.device)
    row, key = (torch.arange(n, device=q.device) for n in size[2:])
    distance = (row[:, None] - key).abs()
    for head in range(shape.heads):
        bias[0, head] -= 2 ** (-8 * (head + 1) / shape.heads) * distance
    return bias


def starts(lengths: tuple[int, ...], device) -> torch.Tensor:
    """Returns cu_seqlens, int32 [sequences + 1]."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
