"""Lists the problems on which our kernels might be slower than stock's."""

from __future__ import annotations

import random
from itertools import product

from fa4_ext.bench.shapes import Shape, packed, square

GIB = 1 << 30


def decode_like(quick: bool) -> list[Shape]:
    """Returns problems of few queries against many keys."""
    seqlens_q = (1, 4, 16, 32, 64, 128, 256, 512)
    seqlens_k = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    batches = ((1, 8, 8), (1, 32, 8), (2, 16, 1), (4, 16, 16), (8, 32, 8), (32, 16, 2), (64, 32, 8))
    if quick:
        seqlens_q, seqlens_k, batches = (1, 16, 128), (512, 4096, 65536), ((1, 32, 8), (8, 32, 8))
    shapes = [
        Shape(batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, causal)
        for (batch, heads, heads_kv), seqlen_q, seqlen_k, head_dim, causal in product(
            batches, seqlens_q, seqlens_k, (64, 128), (False, True)
        )
        if seqlen_q <= seqlen_k
    ]
    return [shape for shape in shapes if shape.bytes <= GIB]


def short(quick: bool) -> list[Shape]:
    """Returns dense self-attention over short sequences, such as images and sentences."""
    lengths = (64, 197) if quick else (32, 64, 77, 128, 197, 256, 384)
    every = product((8, 64, 512), ((12, 12), (32, 8)), lengths, (64, 128), (False, True))
    return [
        square(batch, heads, length, dim, causal, heads_kv=kv)
        for batch, (heads, kv), length, dim, causal in every
    ]


def many_short(quick: bool) -> list[Shape]:
    """Returns packed sequences, all of one length or of random ones."""
    tokens = (16384,) if quick else (2048, 8192, 16384, 65536, 262144)
    means = (32, 128, 512) if quick else (16, 32, 64, 128, 256, 512, 1024, 2048)
    shapes = []
    for total, mean, (heads, heads_kv), head_dim, causal, uniform in product(
        tokens, means, ((16, 16), (32, 8)), (64, 128), (False, True), (True, False)
    ):
        count = total // mean
        # With more sequences ours is slower by far, because every CTA searches all for its own.
        if not 1 <= count <= 1024:
            continue
        chosen = random.Random(f"{total} {mean}")
        lengths = (
            (mean,) * count
            if uniform
            else tuple(chosen.randint(1, 2 * mean - 1) for _ in range(count))
        )
        shapes.append(packed(heads, heads_kv, head_dim, causal, lengths, mean=mean))
    return shapes


def problems(quick: bool) -> list[Shape]:
    """Returns all problems in a random order that is the same in every run, so that a run cut short
    has seen a fair sample."""
    shapes = decode_like(quick) + short(quick) + many_short(quick)
    random.Random(0).shuffle(shapes)
    return shapes
