"""Draws what is added to attention's scores: kinds of biases, the forms that they are broadcast
from, and how they lie in memory. Nothing here looks at a value, so meta tensors will do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from layouts import cut_from, offset

if TYPE_CHECKING:
    from cases import Problem

INFINITE = float("-inf")
# What PyTorch fills a bool mask with for the cuDNN op. In bf16 it is rounded to -65536.
FILL = -65504.0
LOWEST = None  # the least of the dtype, which transformers fills masks with
BATCH, HEADS, QUERIES, KEYS = range(4)


@dataclass(frozen=True)
class Draw:
    """Draws of a bias's own sizes, where one stands for all that it is broadcast over."""

    problem: Problem
    sizes: tuple[int, ...]  # [batch, heads, queries, keys]
    device: str
    generator: torch.Generator | None

    def of(self, *dims: int) -> tuple[int, ...]:
        """The sizes, but for one in the dimensions that are not given."""
        return tuple(size if dim in dims else 1 for dim, size in enumerate(self.sizes))

    def uniform(self, *dims: int) -> torch.Tensor:
        return torch.rand(self.of(*dims), device=self.device, generator=self.generator)

    def normal(self) -> torch.Tensor:
        return torch.randn(self.sizes, device=self.device, generator=self.generator)

    def lengths(self, longest: int) -> torch.Tensor:
        """From one to `longest`, for each batch entry."""
        return 1 + (self.uniform(BATCH) * longest).floor().clamp(max=longest - 1)

    @property
    def queries(self) -> torch.Tensor:
        return torch.arange(self.problem.max_q, device=self.device)[:, None]

    @property
    def keys(self) -> torch.Tensor:
        return torch.arange(self.problem.max_k, device=self.device)

    @property
    def diagonal(self) -> torch.Tensor:
        """The last key of each query under a causal mask that is aligned bottom-right."""
        return self.queries + self.problem.max_k - self.problem.max_q


# What is hidden


def causal(draw: Draw) -> torch.Tensor:
    return draw.keys > draw.diagonal


def causal_top_left(draw: Draw) -> torch.Tensor:
    return draw.keys > draw.queries


def padding_right(draw: Draw) -> torch.Tensor:
    return draw.keys >= draw.lengths(draw.problem.max_k)


def padding_left(draw: Draw) -> torch.Tensor:
    return draw.keys < draw.problem.max_k - draw.lengths(draw.problem.max_k)


def left_padded_causal(draw: Draw) -> torch.Tensor:
    """No key is left to queries of the padding."""
    return padding_left(draw) | causal(draw)


def window(draw: Draw) -> torch.Tensor:
    """Where there are many more queries than keys, or fewer, some rows may have no key."""
    width = max(draw.problem.max_k // 4, 1)
    return (draw.keys > draw.diagonal + 3) | (draw.keys < draw.diagonal - width)


def packed(draw: Draw) -> torch.Tensor:
    """Several documents a sequence. Queries are the last tokens."""
    longest = max(draw.problem.max_q, draw.problem.max_k)
    starts = torch.rand(
        (draw.sizes[BATCH], 1, 1, longest), device=draw.device, generator=draw.generator
    )
    number = (starts < 3 / longest).int().cumsum(dim=-1)
    of_queries = number[..., longest - draw.problem.max_q :].transpose(-1, -2)
    return of_queries != number[..., longest - draw.problem.max_k :]


def documents(draw: Draw) -> torch.Tensor:
    """Several a sequence, each causal."""
    return packed(draw) | causal(draw)


def prefix(draw: Draw) -> torch.Tensor:
    """The first keys are seen by all queries, and the others as under a causal mask."""
    return causal(draw) & (draw.keys >= draw.lengths(draw.problem.max_k))


def one_key(draw: Draw) -> torch.Tensor:
    seen = draw.uniform(BATCH, HEADS, QUERIES) * draw.problem.max_k
    return draw.keys != seen.floor().clamp(max=draw.problem.max_k - 1)


def holes(draw: Draw) -> torch.Tensor:
    return draw.uniform(BATCH, HEADS, QUERIES, KEYS) < 0.3


def rows_without_keys(draw: Draw) -> torch.Tensor:
    """Some rows among others, and some tiles' worth of rows."""
    rows = draw.uniform(BATCH, HEADS, QUERIES)
    blocks = rows[:, :, ::64].repeat_interleave(64, dim=QUERIES)[:, :, : rows.shape[QUERIES]]
    return holes(draw) | (rows < 0.2) | (blocks < 0.4)


def nothing(draw: Draw) -> torch.Tensor:
    return torch.zeros(draw.sizes, dtype=torch.bool, device=draw.device)


# What is added


def normal(draw: Draw) -> torch.Tensor:
    return draw.normal()


def alibi(draw: Draw) -> torch.Tensor:
    """A slope per head."""
    heads = torch.arange(1, draw.sizes[HEADS] + 1, device=draw.device)[:, None, None]
    return -(2.0 ** (-8 * heads / draw.sizes[HEADS])) * (draw.diagonal - draw.keys).abs()


def large(draw: Draw) -> torch.Tensor:
    """Rows whose keys are all far below zero, and keys that are far below the others."""
    return -1e4 * (draw.uniform(BATCH, HEADS, QUERIES, KEYS) < 0.5) - 1e4 * (
        draw.uniform(BATCH, HEADS, QUERIES) < 0.3
    )


def high(draw: Draw) -> torch.Tensor:
    """Keys that are far above the others, if a row has any."""
    most = 3e4 if draw.problem.dtype is torch.float16 else 1e9
    return most * (draw.uniform(BATCH, QUERIES, KEYS) < 0.01)


def blocks(draw: Draw) -> torch.Tensor:
    """Tiles that are hidden, free, or neither, in any order."""
    rows, keys = (-(-size // 64) for size in draw.sizes[QUERIES:])
    shape = (*draw.sizes[:QUERIES], rows, keys)
    kinds = torch.rand(shape, device=draw.device, generator=draw.generator)
    for dim in (QUERIES, KEYS):
        kinds = kinds.repeat_interleave(64, dim=dim).narrow(dim, 0, draw.sizes[dim])
    return (draw.normal() * (kinds > 0.7)).masked_fill(kinds < 0.4, INFINITE)


@dataclass(frozen=True)
class Kind:
    form: str  # its own one
    rule: Callable[[Draw], torch.Tensor]  # what is hidden, or with `added` what is added
    fill: float | None = INFINITE
    added: bool = False

    @property
    def is_mask(self) -> bool:
        """Whether a bool mask says the same."""
        return not self.added and self.fill == INFINITE


KINDS = {
    "causal": Kind("queries_keys", causal),
    "causal_top_left": Kind("queries_keys", causal_top_left),
    "padding_right": Kind("batch_keys", padding_right),
    "padding_left": Kind("batch_keys", padding_left),
    "window": Kind("one", window),
    "documents": Kind("batch", documents),
    "prefix": Kind("batch", prefix),
    "one_key": Kind("all", one_key),
    "holes": Kind("all", holes),
    "rows_without_keys": Kind("all", rows_without_keys),
    "nothing": Kind("all", nothing),
    "filled_rows": Kind("all", rows_without_keys, FILL),
    "filled_window": Kind("one", window, FILL),
    "lowest_rows": Kind("all", rows_without_keys, LOWEST),
    "lowest_left_padded_causal": Kind("batch", left_padded_causal, LOWEST),
    "billion_rows": Kind("all", rows_without_keys, -1e9),
    # A query's first tiles may have nothing but such elements, and its last one what it sees.
    "low_packed": Kind("batch", packed, -1e10),
    "lower_packed": Kind("batch", packed, -1e30),
    "normal": Kind("all", normal, added=True),
    "alibi": Kind("heads", alibi, added=True),
    "large": Kind("all", large, added=True),
    "high": Kind("batch", high, added=True),
    "blocks": Kind("all", blocks, added=True),
}
# What there is one of is broadcast.
FORMS = {
    "queries_keys": (QUERIES, KEYS),
    "one": (QUERIES, KEYS),
    "batch_keys": (BATCH, KEYS),
    "heads": (HEADS, QUERIES, KEYS),
    "batch_heads_keys": (BATCH, HEADS, KEYS),
    "batch": (BATCH, QUERIES, KEYS),
    "all": (BATCH, HEADS, QUERIES, KEYS),
    "queries": (BATCH, HEADS, QUERIES),
}
TWO_DIMENSIONS = ("queries_keys",)  # the others have four


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


# The elements beside a slice are NaN.
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": transposed,
    "row_stride_odd": cut_from(-1, 0, 1),
    "slice_of_keys": cut_from(-1, 3, 5),
    "slice_of_even_keys": cut_from(-1, 2, 6),
    "slice_of_rows": cut_from(-2, 5, 7),
    "offset_2_bytes": offset(1),
    "offset_4_bytes": offset(2),
}
# This one has strides of 0, the sizes of the scores, and four dimensions.
EXPANDED = "expanded"


def full_sizes(problem: Problem) -> tuple[int, int, int, int]:
    return problem.batch, problem.heads, problem.max_q, problem.max_k


def make(problem: Problem, device: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Returns the bias of a dense problem."""
    kind = KINDS[problem.bias]
    form = problem.bias_form or kind.form
    sizes = tuple(size if dim in FORMS[form] else 1 for dim, size in enumerate(full_sizes(problem)))
    values = kind.rule(Draw(problem, sizes, device, generator))
    if not kind.added:
        fill = torch.finfo(problem.dtype).min if kind.fill is LOWEST else kind.fill
        values = torch.zeros(values.shape, device=device).masked_fill(values, fill)
    # A kind may know no smaller form.
    for dim in range(-values.dim(), 0):
        if sizes[dim] == 1:
            values = values.narrow(dim, values.shape[dim] // 2, 1)
    values = values.expand(sizes).to(problem.dtype)
    values = values[0, 0] if form in TWO_DIMENSIONS else values
    if problem.bias_layout == EXPANDED:
        return values.contiguous().expand(full_sizes(problem))
    return LAYOUTS[problem.bias_layout](values)
