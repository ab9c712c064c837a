"""Lists dense problems on which our kernels might be slower than cuDNN."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

from benchmarks import random_calls
from fa4_ext.bench.shapes import Shape

GIB = 1 << 30
TOKENS = 16384  # of a batch of long sequences
# No sample that is reported has this seed (benchmarks.default_choice).
DRAWN, DRAWN_SEED = 600, 190_000


@dataclass(frozen=True, kw_only=True)
class Call(Shape):
    """A dense problem, in which value may have a head dim of its own."""

    head_dim_v: int

    @property
    def bytes(self) -> int:
        """Returns the bytes of q, k and v in a 2-byte dtype."""
        of_q, of_kv = self.head_dim, self.head_dim + self.head_dim_v
        return 2 * (self.total_q * self.heads * of_q + self.total_k * self.heads_kv * of_kv)


HeadDims = tuple[int, int]
Heads = tuple[int, int]  # of queries, and of keys and values


def _call(
    batch: int, heads: Heads, queries: int, keys: int, head_dims: HeadDims, causal: bool = False
) -> Call:
    head_dim, head_dim_v = head_dims
    return Call(batch, *heads, queries, keys, head_dim, causal, head_dim_v=head_dim_v)


def one_query() -> list[Call]:
    """Returns steps of decoding. cuDNN is faster on some of head dim 64."""
    known = [
        _call(batch, heads, 1, keys, (64, 64))
        for batch, heads, keys in (
            (128, (64, 8), 347),
            (1, (16, 16), 90145),
            (1, (32, 8), 90145),
            (16, (32, 32), 668),
            (64, (32, 8), 1584),
        )
    ]
    grids = (
        ((64,), (1, 4, 16, 64, 128), (128, 512, 2048, 8192, 65536), ((32, 32), (32, 8), (64, 8))),
        ((128,), (1, 8, 64), (128, 512, 2048, 8192, 65536), ((32, 32), (32, 8))),
        ((96, 192, 256), (1, 64), (512, 8192), ((16, 16), (32, 8))),
        # Head dims below their bucket, and other ratios of heads.
        ((136, 192, 256), (2, 40), (45, 250, 1000, 4000), ((16, 16), (16, 1), (32, 8), (64, 8))),
        ((128,), (2, 8, 30), (60, 200, 1000), ((8, 8), (16, 1), (64, 8))),
        ((72, 96), (4, 30), (150, 1000), ((12, 12), (16, 1))),
    )
    return known + [
        _call(batch, heads, 1, keys, (head_dim, head_dim))
        for head_dims, batches, lengths, every in grids
        for head_dim, batch, keys, heads in product(head_dims, batches, lengths, every)
    ]


def few_queries() -> list[Call]:
    grids = (
        ((64, 128), ((32, 32), (32, 8)), (4, 16, 64), (512, 4096, 32768)),
        ((96, 192, 256), ((32, 8),), (16,), (512, 8192)),
    )
    return [
        _call(batch, heads, queries, keys, (head_dim, head_dim))
        for grid in grids
        for batch, head_dim, heads, queries, keys in product((1, 16), *grid)
    ]


def few_trained_queries() -> list[Call]:
    """Returns attention of few queries to more keys, which is trained."""
    every = product((2, 16), ((16, 16), (64, 8)), (3, 16), (64, 700), (64, 128), (False, True))
    return [
        _call(batch, heads, queries, keys, (head_dim, head_dim), causal)
        for batch, heads, queries, keys, head_dim, causal in every
    ]


def short() -> list[Call]:
    """Returns self-attention over short sequences, such as images and sentences."""
    every = product((1, 8, 64, 256), ((12, 12), (32, 8)), (64, 192, 512), (64, 128), (False, True))
    return [
        _call(batch, heads, length, length, (head_dim, head_dim), causal)
        for batch, heads, length, head_dim, causal in every
    ]


def short_groups() -> list[Call]:
    """Returns self-attention over short sequences, in which many query heads share a key/value
    head."""
    every = product((1, 3, 16), ((64, 8), (16, 2)), (40, 73, 130), (64, 128), (False, True))
    return [
        _call(batch, heads, length, length, (head_dim, head_dim), causal)
        for batch, heads, length, head_dim, causal in every
    ]


def more_queries() -> list[Call]:
    """Returns causal attention of more queries than keys. The mask is aligned top-left, so the last
    queries see all keys."""
    lengths = ((71, 25), (330, 60), (1264, 1125), (4000, 300))
    every = product((1, 8, 64), ((16, 16), (32, 8)), lengths, (64, 128))
    return [
        _call(batch, heads, queries, keys, (head_dim, head_dim), causal=True)
        for batch, heads, (queries, keys), head_dim in every
    ]


def long() -> list[Call]:
    """Returns self-attention over long sequences in all buckets of head dims."""
    head_dims = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
    every = product(head_dims, ((16, 16), (32, 8)), (512, 2048, 8192), (False, True))
    return [
        _call(TOKENS // length, heads, length, length, of_both, causal)
        for of_both, heads, length, causal in every
        if length > 512 or of_both[0] not in (64, 128)  # `short` has these
    ]


def small_and_wide() -> list[Call]:
    """Returns single sequences, whose tiles leave SMs idle, in the buckets that `short` lacks."""
    head_dims = ((96, 96), (192, 128), (192, 192), (256, 256))
    every = product(head_dims, ((16, 16), (32, 8)), (256, 1024), (False, True))
    return [
        _call(1, heads, length, length, of_both, causal) for of_both, heads, length, causal in every
    ]


def across() -> list[Call]:
    """Returns attention of an image to a text, or of a text to an image."""
    lengths = ((4096, 77), (1024, 256), (256, 4096))
    return [
        _call(8, (16, 16), queries, keys, (head_dim, head_dim))
        for (queries, keys), head_dim in product(lengths, (64, 128))
    ]


def drawn() -> list[tuple[Call, str]]:
    """Returns random calls as models make them, with which no grid was in mind. A backward is
    where ours loses most, so all but those of one query have one."""
    found = []
    for call in random_calls.sample(DRAWN_SEED, DRAWN):
        if call.entry == random_calls.VARLEN:
            continue
        heads, head_dims = (call.heads, call.heads_kv), (call.head_dim, call.head_dim_v)
        shape = _call(call.batch, heads, call.seqlen_q, call.seqlen_k, head_dims, call.causal)
        found.append((shape, "forward" if call.seqlen_q == 1 else "backward"))
    return found


def problems(quick: bool) -> list[tuple[Call, str]]:
    """Returns calls and directions, in a random order that is the same in every run, so that a run
    cut short has seen a fair sample. Of one query and of few there are forwards only."""
    forwards = one_query() + few_queries()
    both = few_trained_queries() + short() + short_groups() + more_queries()
    both += long() + small_and_wide() + across()
    calls = [call for call in dict.fromkeys(forwards + both) if call.bytes <= 2 * GIB]
    if quick:
        calls = calls[::8]
    random.Random(0).shuffle(calls)
    trained = set(both)
    grid = [
        (call, direction)
        for call in calls
        for direction in (("forward", "backward") if call in trained else ("forward",))
    ]
    return list(dict.fromkeys(grid + ([] if quick else drawn())))
