"""Draws random calls that our kernels cover, as models make them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import cycle, islice

SDPA, VARLEN = "sdpa", "varlen"
DIRECTIONS = ("forward", "forward+backward")
LONGEST = 16384
# What a call may take: these bound the time and the memory of a measurement.
MAX_FLOPS = 1e12  # of a forward
MAX_BYTES = 1 << 28  # of q, k and v
MAX_ROWS = 1 << 18  # of all sequences together

# The head dims of most models, and any other that kernels take.
COMMON_HEAD_DIMS = (64, 128)
HEAD_DIMS = tuple(range(8, 257, 8))
# Head dims of query and of value that cuDNN takes on Hopper.
UNEQUAL_HEAD_DIMS = ((192, 128), (192, 128), (128, 64), (64, 128), (96, 64))
HEADS = ((8, 8), (12, 12), (16, 16), (32, 32), (32, 8), (28, 4), (64, 8), (16, 1), (16, 2))


@dataclass(frozen=True)
class Call:
    """A call of F.scaled_dot_product_attention, or of varlen_attn if there are `lengths`.

    Attributes:
        kind: a key of KINDS.
        direction: one of DIRECTIONS.
        dtype: bf16 or fp16.
        seqlen_q, seqlen_k: with packed sequences the length of the longest.
        causal: aligned top-left, as F.scaled_dot_product_attention does.
        contiguous: whether memory is [batch, heads, seqlen, head_dim], not the [batch, seqlen,
            heads, head_dim] that a projection leaves.
        lengths: rows of each packed sequence, of q and k alike.
    """

    kind: str
    direction: str
    dtype: str
    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    contiguous: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def entry(self) -> str:
        return VARLEN if self.lengths else SDPA

    @property
    def rows(self) -> tuple[int, int]:
        """Returns the rows of all sequences, of queries and of keys."""
        packed = sum(self.lengths)
        return packed or self.batch * self.seqlen_q, packed or self.batch * self.seqlen_k

    @property
    def bytes(self) -> int:
        """Returns the bytes of q, k and v."""
        rows_q, rows_k = self.rows
        of_kv = self.heads_kv * (self.head_dim + self.head_dim_v)
        return 2 * (rows_q * self.heads * self.head_dim + rows_k * of_kv)

    @property
    def flops(self) -> int:
        """Returns the operations of a forward without a mask."""
        pairs = (
            sum(length**2 for length in self.lengths) or self.batch * self.seqlen_q * self.seqlen_k
        )
        return 2 * (self.head_dim + self.head_dim_v) * self.heads * pairs

    def __str__(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.heads_kv}" if self.heads_kv != self.heads else "")
        lengths = f"S{self.seqlen_q}" + (
            f" Sk{self.seqlen_k}" if self.seqlen_k != self.seqlen_q else ""
        )
        head_dims = f"D{self.head_dim}" + (
            f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        )
        mask = " causal" if self.causal else ""
        layout = "packed" if self.lengths else "contiguous" if self.contiguous else "transposed"
        return (
            f"{self.entry} B{self.batch} {heads} {lengths} {head_dims}{mask} {self.dtype} {layout} "
            f"{self.direction}"
        )


def _up_to(rng: random.Random, low: int, high: int) -> int:
    """Draws every order of magnitude equally often."""
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _head_dim(rng: random.Random) -> int:
    return rng.choice(COMMON_HEAD_DIMS) if rng.random() < 0.5 else rng.choice(HEAD_DIMS)


def _fitted(rng: random.Random, call: dict) -> Call:
    """Draws a batch with which the call stays within the bounds. A single sequence that exceeds
    them is shortened."""
    lengths = {name: call[name] for name in ("seqlen_q", "seqlen_k")}
    while True:
        one = Call(**call | lengths, batch=1)
        most = min(
            MAX_FLOPS / one.flops, MAX_BYTES / one.bytes, MAX_ROWS / max(lengths.values()), 512
        )
        if most >= 1:
            return Call(**call | lengths, batch=_up_to(rng, 1, int(most)))
        lengths = {name: max(1, length // 2) for name, length in lengths.items()}


def _dense(rng: random.Random, kind: str, direction: str) -> Call:
    heads, heads_kv = rng.choice(HEADS)
    head_dim = head_dim_v = _head_dim(rng)
    seqlen_q = seqlen_k = _up_to(rng, 16, LONGEST)
    causal = rng.random() < 0.5
    if kind == "one query":
        seqlen_q, causal = 1, False
    elif kind == "unequal lengths":
        seqlen_q = _up_to(rng, 2, LONGEST)
    elif kind == "unequal head dims":
        head_dim, head_dim_v = rng.choice(UNEQUAL_HEAD_DIMS)
    call = dict(
        kind=kind, direction=direction, dtype=rng.choice(("bf16", "bf16", "fp16")),
        heads=heads, heads_kv=heads_kv, seqlen_q=seqlen_q, seqlen_k=seqlen_k,
        head_dim=head_dim, head_dim_v=head_dim_v, causal=causal, contiguous=rng.random() < 0.3,
    )  # fmt: skip
    return _fitted(rng, call)


def _packed(rng: random.Random, kind: str, direction: str) -> Call:
    heads, heads_kv = rng.choice(HEADS)
    head_dim = _head_dim(rng)
    mean = _up_to(rng, 16, 4096)
    count = max(1, _up_to(rng, 2048, 32768) // mean)
    lengths = tuple(rng.randint(1, 2 * mean - 1) for _ in range(count))
    call = Call(
        kind, direction, rng.choice(("bf16", "bf16", "fp16")), count, heads, heads_kv,
        max(lengths), max(lengths), head_dim, head_dim, rng.random() < 0.5, lengths=lengths,
    )  # fmt: skip
    within = call.flops <= MAX_FLOPS and call.bytes <= MAX_BYTES
    return call if within else _packed(rng, kind, direction)


# A sample has the kinds in this mix.
KINDS = {
    "self-attention": (_dense, 8),
    "one query": (_dense, 4),
    "unequal lengths": (_dense, 3),
    "unequal head dims": (_dense, 2),
    "packed": (_packed, 3),
}


def sample(seed: int, count: int) -> list[Call]:
    """Returns `count` calls, the same ones for the same seed. A longer sample begins with a shorter
    one. One query has forwards only; the rest draw a direction."""
    kinds = [kind for kind, (_, share) in KINDS.items() for _ in range(share)]
    random.Random(0).shuffle(kinds)
    calls = []
    for number, kind in enumerate(islice(cycle(kinds), count)):
        rng = random.Random(f"{seed} {number}")
        direction = DIRECTIONS[0] if kind == "one query" else rng.choice(DIRECTIONS)
        draw, _ = KINDS[kind]
        calls.append(draw(rng, kind, direction))
    return calls
