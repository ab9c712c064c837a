"""Defines what a test asks of attention: the problem, its random inputs, and the lists that the
tests are parametrised over."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import biases
import torch

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BLACKWELL = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 10
HEAD_DIMS = (64, 128, 256) if BLACKWELL else (64, 96, 128, 192, 256)  # the matrix's buckets
# Pairs of query's and value's head dim: the bucket for unequal ones, below it, and in the buckets
# of equal ones.
UNEQUAL_HEAD_DIMS = (
    (192, 128), (160, 128), (136, 96), (192, 8), (128, 64), (40, 120), (192, 136), (128, 192),
    (256, 64), (8, 248),
)  # fmt: skip
MASKS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window": (37, 21)},
}
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}  # (query heads, key/value heads)
NASTY_LENGTHS = (1, 2, 3, 63, 65, 127, 129, 239, 799, 1023, 4224)


@dataclass(frozen=True)
class Problem:
    """One attention call. `seqlens_q` and `seqlens_k` hold a length for every batch entry; those of
    a dense problem are all equal."""

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    heads: int = 4
    heads_kv: int = 4
    seqlens_q: tuple[int, ...] = (239, 239)
    seqlens_k: tuple[int, ...] = (239, 239)
    varlen: bool = False
    is_causal: bool = False  # bottom-right aligned
    window: tuple[int, int] = (-1, -1)  # keys to the left and right of the diagonal; -1: all
    scale: float | None = None
    head_dim_v: int | None = None  # None: head_dim
    slack: tuple[int, int] = (0, 0)  # varlen: what max_q and max_k have above the longest sequence
    top_left: bool = False  # is_causal is aligned top-left, as the cuDNN op has it
    # A dense problem only: of biases.KINDS, FORMS and LAYOUTS. Without a form it is the kind's own.
    bias: str | None = None
    bias_form: str = ""
    bias_layout: str = "contiguous"

    @property
    def max_q(self) -> int:
        return max(self.seqlens_q) + self.slack[0]

    @property
    def max_k(self) -> int:
        return max(self.seqlens_k) + self.slack[1]

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def bounds(self) -> tuple[int, int]:
        """Returns window bounds with the causal mask written as one; -1 is unbounded. A bound of
        max_k or more is none, as in stock."""
        left, right = (-1 if bound >= self.max_k else bound for bound in self.window)
        return (left, 0) if self.is_causal else (left, right)

    @property
    def batch(self) -> int:
        return len(self.seqlens_q)

    def shape(self, side: str) -> tuple[int, ...]:
        """Returns [batch, seqlen, heads, head_dim], or [total, heads, head_dim] with varlen. `side`
        is "q", "k", "v" or "o"."""
        seqlens, heads = (
            (self.seqlens_q, self.heads) if side in "qo" else (self.seqlens_k, self.heads_kv)
        )
        rows = (sum(seqlens),) if self.varlen else (self.batch, seqlens[0])
        return (
            *rows,
            heads,
            self.head_dim if side in "qk" or self.head_dim_v is None else self.head_dim_v,
        )


def dense(seqlen_q: int, seqlen_k: int, *, batch: int = 2, **fields) -> Problem:
    return Problem(seqlens_q=(seqlen_q,) * batch, seqlens_k=(seqlen_k,) * batch, **fields)


def varlen(seqlens_q, seqlens_k=None, **fields) -> Problem:
    return Problem(
        seqlens_q=tuple(seqlens_q), seqlens_k=tuple(seqlens_k or seqlens_q), varlen=True, **fields
    )


@dataclass
class Inputs:
    """The tensors of a call in the layout of `_flash_attention_forward`. `do` is the gradient of
    the output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None  # int32 [batch + 1]
    cu_seqlens_k: torch.Tensor | None = None
    bias: torch.Tensor | None = None  # is added to the scores, [..., seqlen_q, seqlen_k]


def cumulative(seqlens) -> torch.Tensor:
    return torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, device=DEVICE)


def make_inputs(problem: Problem) -> Inputs:
    def normal(side):
        return torch.randn(problem.shape(side), dtype=problem.dtype, device=DEVICE)

    inputs = Inputs(normal("q"), normal("k"), normal("v"), normal("o"))
    if problem.varlen:
        inputs.cu_seqlens_q = cumulative(problem.seqlens_q)
        inputs.cu_seqlens_k = cumulative(problem.seqlens_k)
    if problem.bias:
        inputs.bias = biases.make(problem, DEVICE)
    return inputs


def poison(inputs: Inputs) -> None:
    """Fills the allocator's free blocks of the sizes that a call asks for with 0xFF: a NaN in every
    float dtype, -1 in a counter."""
    rows = inputs.q.nbytes // inputs.q.shape[-1]
    sizes = {
        factor * tensor.nbytes
        for tensor in vars(inputs).values()
        if tensor is not None
        for factor in (1, 2, 4)
    }
    sizes |= {512, rows, 2 * rows}
    if inputs.bias is not None:  # the lists of tiles take some memory, too
        sizes |= {2**power for power in range(9, 21)}
    blocks = [
        torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
        for size in sizes
        for _ in range(3)
        if size
    ]
    del blocks
