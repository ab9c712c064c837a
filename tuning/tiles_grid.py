"""Lists self-attention problems on which another tile than the default might win. Each combination
of the features that the rules see is measured twice, so that no rule stands on one measurement."""

from __future__ import annotations

import random

from fa4_ext.bench.shapes import Shape, packed, square
from kernels.kernel import Kernel
from kernels.matrix import candidates, with_candidates

TOKENS = 16384
HIDDEN = 2048
# Under GQA so many query heads share a key/value head.
GROUP = 4
# The device that is measured has so many SMs.
SM_COUNT = 132
# ViT has lengths of 197 and 577.
LENGTHS = (128, 197, 256, 384, 512, 577, 1024, 2048, 4096, 8192, 16384)
FEW_LENGTHS = (320, 577, 1024, 2048)
# So many tiles per 100 SMs make a part of a wave, most of one, and two.
FEW_TILES = (45, 85, 200)
MEANS = (128, 256, 577, 1024, 4096, 8192)


def defaults() -> list[Kernel]:
    """Returns the kernels that have candidates, one for both dtypes and for MHA and GQA."""
    kernels = (kernel for kernel in with_candidates() if not kernel.tuned and candidates(kernel))
    return [k for k in kernels if k.dtype == "bf16" and not k.grouped]


def tile(kernel: Kernel) -> str:
    return f"{kernel.block_m}x{kernel.block_n}"


def _heads(head_dim: int) -> int:
    return HIDDEN // head_dim // GROUP * GROUP


def _many_tiles(seqlen: int, head_dim: int, causal: bool) -> list[tuple[str, Shape]]:
    """Returns the shapes that most train, and GQA in fp16."""
    heads, batch = _heads(head_dim), max(1, TOKENS // seqlen)
    return [
        ("bf16", square(batch, heads, seqlen, head_dim, causal)),
        ("fp16", square(batch, heads, seqlen, head_dim, causal, heads_kv=heads // GROUP)),
    ]


def _few_tiles(seqlen: int, head_dim: int, causal: bool, block_m: int) -> list[tuple[str, Shape]]:
    a_head = -(-seqlen // block_m)
    heads = (max(1, round(tiles * SM_COUNT / 100 / a_head)) for tiles in FEW_TILES)
    return [
        (dtype, square(1, count, seqlen, head_dim, causal))
        for count in heads
        for dtype in ("bf16", "fp16")
    ]


def _packed(mean: int, head_dim: int, causal: bool) -> list[tuple[str, Shape]]:
    """Returns sequences of one length, with GQA, and pairs of two random lengths, which together
    are as long."""
    heads, pairs = _heads(head_dim), TOKENS // (2 * mean)
    chosen = random.Random(mean)
    shorter = [chosen.randint(1, mean) for _ in range(pairs)]
    mixed = tuple(length for short in shorter for length in (short, 2 * mean - short))
    return [
        ("bf16", packed(heads, heads // GROUP, head_dim, causal, (mean,) * (2 * pairs))),
        ("bf16", packed(heads, heads, head_dim, causal, mixed)),
    ]


def problems(head_dim: int, causal: bool, block_m: int) -> list[tuple[str, Shape]]:
    """Returns dtypes and shapes for a default whose tile has `block_m` rows."""
    return [
        *(problem for seqlen in LENGTHS for problem in _many_tiles(seqlen, head_dim, causal)),
        *(
            problem
            for seqlen in FEW_LENGTHS
            for problem in _few_tiles(seqlen, head_dim, causal, block_m)
        ),
        *(problem for mean in MEANS for problem in _packed(mean, head_dim, causal)),
    ]
