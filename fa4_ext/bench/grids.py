"""Defines the named grids of problems."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

from fa4_ext.bench import masks
from fa4_ext.bench.shapes import DIRECTIONS, Shape, packed, square

TFLOPS, MICROSECONDS = "TFLOP/s", "us"
TOKENS = 16384  # per batch, as in the FlashAttention-3 paper
HIDDEN_SIZE = 2048
HEAD_DIMS = (64, 128)  # the paper's, of 16-bit types
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# --quick takes each fifth problem. Of the paper's grid these are five lengths, both masks and both
# head dims.
QUICK_STEP = 5
# The contenders that run if none are named.
CONTENDERS = ("ours", "stock", "cudnn", "fa4", "fa3")


@dataclass(frozen=True)
class Grid:
    about: str
    shapes: tuple[Shape, ...]
    unit: str = TFLOPS
    directions: tuple[str, ...] = DIRECTIONS
    contenders: tuple[str, ...] = CONTENDERS
    # Its figure has the lengths on the axis, not the names.
    by_length: bool = False

    def part(self, quick: bool) -> tuple[Shape, ...]:
        return self.shapes[::QUICK_STEP] if quick else self.shapes


def _by_length(
    head_dims: tuple[int, ...], seqlens: tuple[int, ...], ratio: int = 1
) -> tuple[Shape, ...]:
    """Returns the problems of these head dims and lengths. `ratio` query heads share a key/value
    head."""
    return tuple(
        square(
            TOKENS // seqlen, HIDDEN_SIZE // head_dim, seqlen, head_dim, causal,
            heads_kv=HIDDEN_SIZE // head_dim // ratio,
            name=f"hd{head_dim} s{seqlen} {'causal' if causal else 'full'}",
        )
        for head_dim, causal, seqlen in product(head_dims, (False, True), seqlens)
    )  # fmt: skip


def _llama() -> tuple[Shape, ...]:
    """Returns training steps and prompts. tp8 has the heads of one of eight GPUs."""
    # The columns are model, batch, heads, key/value heads, length and head dim.
    calls = (
        ("llama-2-7b", 4, 32, 32, 4096, 128),
        ("llama-3-8b", 8, 32, 8, 1024, 128),
        ("llama-3-8b", 2, 32, 8, 8192, 128),
        ("llama-3.1-8b", 1, 32, 8, 32768, 128),
        ("llama-3.1-70b tp8", 1, 8, 1, 8192, 128),
        ("llama-3.1-70b tp8", 1, 8, 1, 32768, 128),
        ("llama-3.1-405b tp8", 1, 16, 1, 8192, 128),
        ("llama-3.2-1b", 8, 32, 8, 2048, 64),
        ("llama-3.2-3b", 4, 24, 8, 4096, 128),
    )
    return tuple(
        square(
            batch,
            heads,
            seqlen,
            head_dim,
            True,
            heads_kv=heads_kv,
            name=f"{model} b{batch} s{seqlen}",
        )
        for model, batch, heads, heads_kv, seqlen, head_dim in calls
    )


def _vit() -> tuple[Shape, ...]:
    # The columns are model, batch, heads, tokens of an image and head dim.
    calls = (
        ("vit-b/16", 128, 12, 197, 64),
        ("vit-l/16", 32, 16, 577, 64),
        ("vit-h/14", 64, 16, 257, 80),
        ("siglip-so400m/14", 16, 16, 729, 72),
        ("dinov2-l/14", 16, 16, 1370, 64),
        ("dit-xl/2", 32, 16, 256, 72),
        ("sd3-medium", 2, 24, 4429, 64),
        ("flux.1", 1, 24, 4608, 128),
    )
    return tuple(
        square(batch, heads, tokens, head_dim, False, name=f"{model} b{batch} s{tokens}")
        for model, batch, heads, tokens, head_dim in calls
    )


def _decode() -> tuple[Shape, ...]:
    """Returns decoding steps of Llama-3-8B: new tokens against a cache of keys and values."""
    # The columns are batch, new tokens and keys.
    calls = (
        (1, 1, 4096), (1, 1, 65536), (8, 1, 8192), (64, 1, 2048), (128, 1, 8192), (1, 16, 65536),
        (8, 16, 8192), (8, 128, 8192),
    )  # fmt: skip
    return tuple(
        Shape(batch, 32, 8, q, k, 128, False, name=f"b{batch} q{q} k{k}") for batch, q, k in calls
    )


def _short() -> tuple[Shape, ...]:
    """Returns packed sequences so short, or so many, that finding them and filling tiles costs more
    than the products."""
    draw = random.Random(3)
    batches = {
        "1024x16": (16,) * 1024,
        "256x64": (64,) * 256,
        "4096x64": (64,) * 4096,
        "128x128": (128,) * 128,
        "83x197": (197,) * 83,
        "64x256": (256,) * 64,
        "512x256": (256,) * 512,
        "300 of 2 to 511": tuple(draw.randint(2, 511) for _ in range(300)),
        "512x512": (512,) * 512,
    }
    heads = ((16, 16, 128), (32, 8, 128), (12, 12, 64), (16, 2, 64))
    return tuple(
        packed(
            heads,
            heads_kv,
            head_dim,
            causal,
            lengths,
            name=f"{name} h{heads}/{heads_kv} hd{head_dim} {'causal' if causal else 'full'}",
        )
        for (name, lengths), (heads, heads_kv, head_dim), causal in product(
            batches.items(), heads, (True, False)
        )
    )


def _varlen() -> tuple[Shape, ...]:
    """Returns batches of 16k tokens in packed sequences, with lengths as of documents or
    answers."""
    mixed = [4096, 2048, 2048, 1024, 1024, 1024, 1024, *[512] * 4, *[256] * 6, *[128] * 4]
    # Sequences do not come longest first.
    random.Random(0).shuffle(mixed)
    batches = {
        "uniform 16x1024": (1024,) * 16,
        "mixed": tuple(mixed),
        "many short 256x64": (64,) * 256,
        "one long 14k": (14336, *(128,) * 16),
    }
    return tuple(
        packed(
            heads,
            heads_kv,
            128,
            causal,
            lengths,
            name=f"{name} h{heads}/{heads_kv} {'causal' if causal else 'full'}",
        )
        for (name, lengths), (heads, heads_kv), causal in product(
            batches.items(), ((16, 16), (32, 8)), (True, False)
        )
    )


def _gqa() -> tuple[Shape, ...]:
    return tuple(
        square(
            4,
            32,
            4096,
            head_dim,
            causal,
            heads_kv=kv,
            name=f"h32/{kv} hd{head_dim} {'causal' if causal else 'full'}",
        )
        for head_dim, causal, kv in product((64, 128), (True, False), (32, 8, 4, 1))
    )


def _masks() -> tuple[Shape, ...]:
    # The columns are batch, heads, key/value heads, length and head dim.
    sizes = (
        (4, 16, 16, 2048, 128), (2, 16, 16, 4096, 64), (2, 32, 8, 4096, 128),
        (1, 16, 16, 8192, 128),
    )  # fmt: skip
    return tuple(
        square(
            batch, heads, seqlen, head_dim, False, heads_kv=heads_kv, mask=mask,
            name=f"b{batch} h{heads}/{heads_kv} s{seqlen} hd{head_dim} {mask}",
        )
        for (batch, heads, heads_kv, seqlen, head_dim), mask in product(sizes, masks.KINDS)
    )  # fmt: skip


GRIDS = {
    "paper": Grid(
        "the FlashAttention-3 paper's: 16k tokens, hidden size 2048, head dims 64 and 128",
        _by_length(HEAD_DIMS, LENGTHS),
        by_length=True,
    ),
    "paper-gqa": Grid(
        "the same with eight query heads on a head of keys and values",
        _by_length(HEAD_DIMS, LENGTHS, ratio=8),
        by_length=True,
    ),
    "dims": Grid(
        "the paper's with head dims 96, 192 and 256",
        _by_length((96, 192, 256), (1024, 4096, 16384)),
        by_length=True,
    ),
    "llama": Grid("training steps and prompts of Llama models, causal, grouped heads", _llama()),
    "vit": Grid("images: vision transformers and diffusion", _vit()),
    "decode": Grid(
        "few queries against many keys, forward only", _decode(), MICROSECONDS, ("forward",)
    ),
    "varlen": Grid("16k tokens of packed sequences, head dim 128", _varlen()),
    "short": Grid(
        "packed sequences of up to 512 tokens, up to 4,096 of them",
        _short(),
        MICROSECONDS,
        contenders=("ours", "stock", "fa4"),
    ),
    "gqa": Grid("32 query heads on 32, 8, 4 and 1 heads of keys and values, length 4096", _gqa()),
    "masks": Grid(
        "masks that are tensors: padding, causal, windows, documents, prefixes, slopes",
        _masks(),
        MICROSECONDS,
        contenders=("ours", "cudnn", "efficient", "unmasked"),
    ),
}
