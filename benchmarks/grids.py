"""The problems that are measured."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """Self-attention of `heads` heads in bf16."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    causal: bool

    @property
    def name(self) -> str:
        return f"hd{self.head_dim} s{self.seqlen} {'causal' if self.causal else 'full'}"

    def flops(self, direction: str) -> float:
        """4 B H S^2 D, half of it with a causal mask; the backward counts 2.5 times the forward."""
        forward = 4 * self.batch * self.heads * self.seqlen**2 * self.head_dim / (2 if self.causal else 1)
        return forward * (2.5 if direction == "backward" else 1)


def paper(quick: bool) -> list[Shape]:
    """The FlashAttention-3 paper's grid: 16k tokens, hidden size 2048."""
    return _paper((64, 128), (1024, 8192) if quick else (512, 1024, 2048, 4096, 8192, 16384))


def dims(quick: bool) -> list[Shape]:
    """The same for the other head dims."""
    return _paper((96, 192, 256), (4096,) if quick else (1024, 4096, 16384))


def _paper(head_dims: tuple[int, ...], seqlens: tuple[int, ...]) -> list[Shape]:
    return [
        Shape(16384 // seqlen, 2048 // head_dim, seqlen, head_dim, causal)
        for head_dim, causal, seqlen in product(head_dims, (False, True), seqlens)
    ]


@dataclass(frozen=True)
class RuleProblem:
    """A problem on which our kernels might lose to stock's. Varlen: `seqlen_q` and `seqlen_k` are means."""

    layout: str  # dense, varlen
    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool
    lengths: tuple[int, ...] = ()  # varlen: of every sequence, the same for queries and keys

    @property
    def longest(self) -> int:
        return max(self.lengths, default=self.seqlen_q)

    @property
    def bytes(self) -> int:
        """Of q, k and v."""
        return 2 * self.batch * self.head_dim * (self.seqlen_q * self.heads + 2 * self.seqlen_k * self.heads_kv)


def decode_like(quick: bool) -> list[RuleProblem]:
    """Few queries against many keys."""
    seqlens_q = (1, 4, 16, 32, 64, 128, 256, 512)
    seqlens_k = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    batches = ((1, 8, 8), (1, 32, 8), (2, 16, 1), (4, 16, 16), (8, 32, 8), (32, 16, 2), (64, 32, 8))
    if quick:
        seqlens_q, seqlens_k, batches = (1, 16, 128), (512, 4096, 65536), ((1, 32, 8), (8, 32, 8))
    problems = [
        RuleProblem("dense", batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, causal)
        for (batch, heads, heads_kv), seqlen_q, seqlen_k, head_dim, causal in product(
            batches, seqlens_q, seqlens_k, (64, 128), (False, True)
        )
        if seqlen_q <= seqlen_k
    ]
    return [problem for problem in problems if problem.bytes <= GIB]


def short(quick: bool) -> list[RuleProblem]:
    """Self-attention over short sequences, dense: images, sentences."""
    lengths = (64, 197) if quick else (32, 64, 77, 128, 197, 256, 384)
    problems = product((8, 64, 512), ((12, 12), (32, 8)), lengths, (64, 128), (False, True))
    return [RuleProblem("dense", batch, *heads, length, length, dim, causal) for batch, heads, length, dim, causal in problems]


def many_short(quick: bool) -> list[RuleProblem]:
    """Packed sequences, all of one length or of random ones."""
    tokens = (16384,) if quick else (2048, 8192, 16384, 65536, 262144)
    means = (32, 128, 512) if quick else (16, 32, 64, 128, 256, 512, 1024, 2048)
    problems = []
    for total, mean, (heads, heads_kv), head_dim, causal, uniform in product(
        tokens, means, ((16, 16), (32, 8)), (64, 128), (False, True), (True, False)
    ):
        count = total // mean
        if not 1 <= count <= 1024:  # more are lost by far: every block looks for its sequence among all
            continue
        chosen = random.Random(f"{total} {mean}")
        lengths = (mean,) * count if uniform else tuple(chosen.randint(1, 2 * mean - 1) for _ in range(count))
        problems.append(RuleProblem("varlen", count, heads, heads_kv, mean, mean, head_dim, causal, lengths))
    return problems


def rules(quick: bool) -> list[RuleProblem]:
    """In a random order that is the same in every run, so that a run cut short has seen a fair sample."""
    problems = decode_like(quick) + short(quick) + many_short(quick)
    random.Random(0).shuffle(problems)
    return problems
