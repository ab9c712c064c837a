"""Describes the problems that are measured, as `Shape`."""

from __future__ import annotations

from dataclasses import dataclass

from fa4_ext.bench import masks

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Shape:
    """One call of attention. With packed sequences (varlen), `seqlen_q` and `seqlen_k` are the mean
    length."""

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool  # bottom-right aligned
    # With varlen these are the lengths of every sequence, the same for queries and keys.
    lengths: tuple[int, ...] = ()
    name: str = ""
    mask: str = ""  # of masks.KINDS: a tensor, with as many queries as keys, and not causal

    @property
    def layout(self) -> str:
        return "varlen" if self.lengths else "dense"

    @property
    def longest(self) -> int:
        return max(self.lengths, default=self.seqlen_q)

    @property
    def total_q(self) -> int:
        return sum(self.lengths) or self.batch * self.seqlen_q

    @property
    def total_k(self) -> int:
        return sum(self.lengths) or self.batch * self.seqlen_k

    @property
    def bytes(self) -> int:
        """Returns the bytes of q, k and v in a 2-byte dtype."""
        return 2 * self.head_dim * (self.total_q * self.heads + 2 * self.total_k * self.heads_kv)

    def flops(self, direction: str) -> float:
        """Counts 4 * head_dim operations for every query head and every pair of query and key that
        the mask leaves; a causal mask leaves half of a square. The backward counts 2.5 times the
        forward."""
        operations = 4 * self.heads * self.head_dim * (2.5 if direction == "backward" else 1)
        if self.mask:
            return operations * masks.pairs(self)
        sizes = [(length, length) for length in self.lengths] or [
            (self.seqlen_q, self.seqlen_k)
        ] * self.batch
        return operations * sum(q * (k - q / 2 if self.causal else k) for q, k in sizes)


def square(
    batch: int,
    heads: int,
    seqlen: int,
    head_dim: int,
    causal: bool,
    *,
    heads_kv: int = 0,
    name: str = "",
    mask: str = "",
) -> Shape:
    """Returns a self-attention problem. `heads_kv` of 0 means as many as query heads (MHA)."""
    sizes = (batch, heads, heads_kv or heads, seqlen, seqlen, head_dim)
    return Shape(*sizes, causal, name=name, mask=mask)


def packed(
    heads: int,
    heads_kv: int,
    head_dim: int,
    causal: bool,
    lengths: tuple[int, ...],
    *,
    mean: int = 0,
    name: str = "",
) -> Shape:
    """Returns a self-attention problem of packed sequences. `mean` is the mean that the lengths
    were drawn around; by default it is their own mean."""
    mean = mean or sum(lengths) // len(lengths)
    return Shape(len(lengths), heads, heads_kv, mean, mean, head_dim, causal, lengths, name)
