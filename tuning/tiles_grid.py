"""Lists self-attention problems on which another tile than the default might win. Each combination
of the features that the rules see is measured twice, so that no rule stands on one measurement."""

from __future__ import annotations

import random

from fa4_ext.bench.shapes import Shape, packed, square
from kernels.kernel import Kernel
from kernels.matrix import candidates, with_candidates

TOKENS = 16384
HIDDEN = 2048
GROUP = 4  # query heads that share a key/value head under GQA
SM_COUNT = 132  # of the device that is measured
# ViT has lengths of 197 and 577.
LENGTHS = (128, 197, 256, 384, 512, 577, 1024, 2048, 4096, 8192, 16384)
FEW_LENGTHS = (320, 577, 1024, 2048)
FEW_TILES = (45, 85, 200)  # per 100 SMs: a part of a wave, most of one, and two
MEANS = (128, 256, 577, 1024, 4096, 8192)


def defaults() -> list[Kernel]:
    """Returns the default kernels that have candidate tiles: of each, the bf16 MHA kernel stands
    for both dtypes and for GQA."""
    kernels = (kernel for kernel in with_candidates() if not kernel.tuned and candidates(kernel))
    return [k for k in kernels if k.dtype == "bf16" and not k.grouped]


def tile(kernel: Kernel) -> str:
    return f"{kernel.block_m}x{kernel.block_n}"


def _heads(head_dim: int) -> int:
    return HIDDEN // head_dim // GROUP * GROUP


def _many_tiles(seqlen: int, head_dim: int, causal: bool) -> list[tuple[str, Shape]]:
    """Returns the shapes of most training runs in bf16, and the same with GQA in fp16."""
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
    """Returns sequences of equal length, with GQA, and pairs of random lengths that add up to twice
    the mean."""
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
