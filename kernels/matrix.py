"""The one declaration of every compiled kernel.

The build, the table that the C++ planner reads, the manifest and the tests all derive from
`matrix()`; a test holds README to it. Tiles of its kernels are the pinned flash-attn-4's own
choices (tile_size functions of its interface.py); a test holds the two side by side. The kernels of
our own, Hopper's forward and decode, have the tiles that were measured to be fastest. Beside these
defaults are the `candidates()` that kernels/tile_rules.csv names, for problems that they were
measured to run faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from itertools import product
from typing import NamedTuple

from kernels import rules


class Op(str, Enum):
    FORWARD = "forward"
    DECODE = "decode"  # a forward of few queries
    BACKWARD = "backward"
    # of the backward: delta = rowsum(dO * O), lse in base 2, dQ accumulator cleared
    PREPROCESS = "preprocess"
    POSTPROCESS = "postprocess"  # of the backward: fp32 accumulator -> dQ, dK or dV
    # of PyTorch's own backward, where a speed rule chooses it: the gradients that it does not write
    CLEAR = "clear"


class Mask(str, Enum):
    FULL = "full"
    CAUSAL = "causal"  # bottom-right aligned
    WINDOW = "window"  # both bounds at run time, bottom-right aligned


class Layout(str, Enum):
    DENSE = "dense"  # [batch, seqlen, heads, head_dim]
    VARLEN = "varlen"  # [total, heads, head_dim] with cu_seqlens
    ANY = "any"  # either, or keys and values in pages: known at run time


ARCHS = (90, 100)  # 100 stands for the family: compute capability 10.0 and 10.3
DTYPES = ("bf16", "fp16")
# By architecture, pairs of query's and value's; a bucket serves every multiple of 8 up to it, in
# either.
HEAD_DIM_BUCKETS = {
    90: ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)),
    100: ((64, 64), (128, 128), (192, 128), (256, 256)),
}


@dataclass(frozen=True)
class Kernel:
    """One compiled object. Fields that do not concern an op keep their defaults."""

    op: Op
    arch: int
    dtype: str
    head_dim: int  # bucket of query's and key's; Op.POSTPROCESS: of the gradient's
    head_dim_v: int  # bucket of value's and the output's; Op.POSTPROCESS: as head_dim
    layout: Layout
    block_m: int  # rows of a tile; for Op.POSTPROCESS rows of the accumulator's tile
    block_n: int = 0
    mask: Mask = Mask.FULL
    grouped: bool = False  # several query heads share a key/value head
    deterministic: bool = False
    two_cta: bool = False  # SM100: a pair of thread blocks shares an MMA
    cluster: int = 1  # Op.POSTPROCESS, varlen: tiles that a sequence's accumulator is padded to
    threads: int = 0  # Op.POSTPROCESS
    # SM90 backward: warpgroups along the rows of dQ's tile; Op.POSTPROCESS: of the accumulator's
    atom_layout_m: int = 1
    swap_ab: bool = False  # the same tile's product is computed transposed
    atom_layout_dkv: int = 2  # SM90 backward: warpgroups along the rows of dK's and dV's tiles
    swap_ab_dkv: bool = False
    dq_warpgroups: int = 2  # SM90 backward: how many compute dQ
    stages: int = 0  # Op.DECODE and SM90 forward: blocks of keys and of values in shared memory
    blocks_per_sm: int = 0  # Op.DECODE: thread blocks that a multiprocessor holds
    q_stages: int = 0  # SM90 forward: tiles of queries in shared memory
    turns: bool = True  # SM90 forward: the warpgroups take turns to issue products
    tuned: bool = False  # a candidate: runs only where a tile rule says so

    @property
    def persistent(self) -> bool:
        """Launched as many thread blocks as work at a time, each on one tile after the other
        (SM100's sizes its grid itself)."""
        return self.op is Op.FORWARD and self.arch == 90

    @property
    def module(self) -> str:
        """Where its entry is, below kernels/."""
        folder = (
            "common" if self.op in (Op.PREPROCESS, Op.POSTPROCESS, Op.CLEAR) else f"sm{self.arch}"
        )
        return f"{folder}/{self.op.value}"

    @property
    def _dims(self) -> str:
        return f"d{self.head_dim}" + (
            f"v{self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        )

    @property
    def name(self) -> str:
        if self.op is Op.CLEAR:
            return f"sm{self.arch}_clear_{self.dtype}_{self.layout.value}"
        parts = [f"sm{self.arch}", self.op.value, self.dtype, self._dims, self.layout.value]
        if self.op in (Op.FORWARD, Op.BACKWARD):
            parts.append(self.mask.value)
        if self.op is Op.BACKWARD:
            parts.append("gqa" if self.grouped else "mha")
        if self.deterministic:
            parts.append("deterministic")
        parts.append(f"m{self.block_m}" + (f"n{self.block_n}" if self.block_n else ""))
        if self.op is Op.POSTPROCESS:
            parts.append(
                f"t{self.threads}a{self.atom_layout_m}c{self.cluster}"
                + ("s" if self.swap_ab else "")
            )
        if self.two_cta:
            parts.append("2cta")
        return "_".join(parts)


# Measured on an H200 (docs/kernels-sm90.md). D 64: a score costs as much in exp as in matrix work,
# so three warpgroups overlap more than two; from D 96 on three spill beside as many keys. Two tiles
# of queries let the next one's load begin early, and the stages fill what is left of shared memory,
# up to where more did not help. From D 192 on it holds one, beside keys in two stages; of them the
# numbers that divide most lengths were faster than what just fits.
_FORWARD_SM90 = {
    (64, 64): dict(block_m=192, block_n=128, stages=3, q_stages=2),
    (96, 96): dict(block_m=128, block_n=128, stages=2, q_stages=2),
    (128, 128): dict(block_m=128, block_n=128, stages=2, q_stages=2),
    (192, 128): dict(block_m=128, block_n=128, stages=2, q_stages=1),
    (192, 192): dict(block_m=128, block_n=96, stages=2, q_stages=1),
    (256, 256): dict(block_m=128, block_n=64, stages=2, q_stages=1),
}
# For up to 64 queries, one warpgroup's rows. Where there are many such sequences their time is that
# of reading them: the stages, of queries too, are what shared memory holds, or enough of it.
_SHORT_FORWARD_SM90 = {
    (64, 64): dict(stages=6, q_stages=4),
    (96, 96): dict(stages=6, q_stages=3),
    (128, 128): dict(stages=5, q_stages=3),
    (192, 128): dict(stages=3, q_stages=2),
    (192, 192): dict(stages=3, q_stages=2),
    (256, 256): dict(stages=2, q_stages=2),
}


def _forward_sm90(dtype, head_dims, layout, mask):
    yield Kernel(Op.FORWARD, 90, dtype, *head_dims, layout, mask=mask, **_FORWARD_SM90[head_dims])
    yield Kernel(
        Op.FORWARD, 90, dtype, *head_dims, layout, 64, 64, mask, **_SHORT_FORWARD_SM90[head_dims]
    )


def _decode_sm90(dtype, head_dims):
    # One warpgroup's rows. A block of keys has 16 KB at least, so that a few in flight hide the
    # memory's latency, and the stages fill what two thread blocks leave each other of a
    # multiprocessor; from D 192 on that holds one.
    block_n, stages, blocks_per_sm = {
        (64, 64): (128, 3, 2),
        (96, 96): (64, 4, 2),
        (128, 128): (64, 3, 2),
        (192, 128): (64, 5, 1),
        (192, 192): (64, 4, 1),
        (256, 256): (64, 3, 1),
    }[head_dims]
    yield Kernel(
        Op.DECODE,
        90,
        dtype,
        *head_dims,
        Layout.ANY,
        64,
        block_n,
        stages=stages,
        blocks_per_sm=blocks_per_sm,
    )


def _forward_sm100(dtype, head_dims, layout, mask):
    # Two 128-row query tiles in flight; one for queries that fit a single tile, where the second
    # would idle. The pair of CTAs needs full tiles of value's D 128 and no mask (upstream's
    # use_2cta_instrs). D 256 leaves tensor memory for one tile, and longer queries always go to a
    # pair, which halves what each loads of K and V.
    largest = head_dims == (256, 256)
    two_cta = largest or (layout is Layout.DENSE and mask is Mask.FULL and head_dims[1] == 128)
    yield Kernel(
        Op.FORWARD,
        100,
        dtype,
        *head_dims,
        layout,
        128 if largest else 256,
        128,
        mask,
        two_cta=two_cta,
    )
    yield Kernel(Op.FORWARD, 100, dtype, *head_dims, layout, 128, 128, mask)


def _backward_sm90(dtype, head_dims, layout, mask, grouped, deterministic):
    block_m, block_n, rest = {
        (64, 64): (128, 128, dict(atom_layout_m=2)),
        (96, 96): (64, 128, dict(dq_warpgroups=1)),  # 64 rows are one warpgroup's
        # 80 rows fill shared memory; masked tiles waste less at 64. WGMMA's M is 64: 80 rows go on
        # its N.
        (128, 128): (80, 128, dict(swap_ab=True)) if mask is Mask.FULL else (64, 128, {}),
        # Tiles of keys that shared memory holds beside dQ's, which are no multiples of 64: head_dim
        # goes on WGMMA's M.
        (192, 128): (64, 96, dict(swap_ab_dkv=True)),
        (192, 192): (64, 96, dict(swap_ab_dkv=True)),
        (256, 256): (64, 48, dict(swap_ab_dkv=True, atom_layout_dkv=1)),
    }[head_dims]
    yield Kernel(
        Op.BACKWARD,
        90,
        dtype,
        *head_dims,
        layout,
        block_m,
        block_n,
        mask,
        grouped,
        deterministic,
        **rest,
    )


def _backward_sm100(dtype, head_dims, layout, mask, grouped, deterministic):
    # D 256: tensor memory holds the accumulators of 64 keys a CTA. Upstream has two more kernels
    # for it, which it takes by default and which one object can't launch; this is the one behind
    # its FLASH_ATTENTION_HD256_GENERIC_BWD.
    block_n = 64 if head_dims == (256, 256) else 128
    two_cta = head_dims[0] >= 128
    yield Kernel(
        Op.BACKWARD,
        100,
        dtype,
        *head_dims,
        layout,
        128,
        block_n,
        mask,
        grouped,
        deterministic,
        two_cta=two_cta,
    )


# Other tiles that a default may lose to, by bucket, and in the backward by mask. Fewer rows of
# queries waste less of short sequences, of the last tile and of the last wave of thread blocks: 192
# rows are half empty at ViT's 197. Fewer keys waste less of short sequences and of the diagonal;
# more keys mean fewer steps. What the backward's registers and shared memory hold is as in
# upstream's sm90_config_search.py. 96 rows are no multiple of 64 and go on WGMMA's N
_SWAPPED_96 = dict(block_m=96, block_n=128, swap_ab=True)
_BACKWARD_CANDIDATES = {
    (64, Mask.FULL): (dict(block_m=64, atom_layout_m=1), _SWAPPED_96),
    (64, Mask.CAUSAL): (dict(block_m=64, atom_layout_m=1), _SWAPPED_96),
    (128, Mask.FULL): (dict(block_m=64, swap_ab=False),),
}
# One warpgroup, 64 rows, is for problems of few tiles or short sequences. Two do better at D 64
# without turns. Three, for long sequences at D 96, have registers for 112 keys.
_FORWARD_CANDIDATES = {
    64: (
        dict(block_m=128, block_n=128, stages=4, q_stages=2, turns=False),
        dict(block_m=64, block_n=128, stages=4, q_stages=2),
    ),
    96: (
        dict(block_m=64, block_n=128, stages=3, q_stages=2),
        dict(block_m=192, block_n=112, stages=2, q_stages=2),
    ),
    128: (dict(block_m=64, block_n=128, stages=2, q_stages=2),),
}


def candidates(default: Kernel) -> tuple[Kernel, ...]:
    """The kernels that tuning/tiles.py measures beside a default: on Hopper, of equal head dims,
    that add up in any order."""
    if default.arch != 90 or default.head_dim != default.head_dim_v or default.deterministic:
        return ()
    found = ()
    if default.op is Op.BACKWARD:
        found = _BACKWARD_CANDIDATES.get((default.head_dim, default.mask), ())
    elif default.op is Op.FORWARD and default.mask is not Mask.WINDOW and default.block_m > 64:
        found = _FORWARD_CANDIDATES.get(default.head_dim, ())
    return tuple(replace(default, tuned=True, **changes) for changes in found)


class Satellites(NamedTuple):
    """The kernels that a backward kernel is launched with."""

    preprocess: Kernel
    postprocess_dq: Kernel
    # none where every query head has its own keys: the backward writes dK and dV itself
    postprocess_dk: Kernel | None
    postprocess_dv: Kernel | None


def satellites(backward: Kernel) -> Satellites:
    head_dim, head_dim_v = backward.head_dim, backward.head_dim_v
    shared = dict(arch=backward.arch, dtype=backward.dtype, layout=backward.layout)
    sm90 = backward.arch == 90
    threads_dq, threads_dkv = (128 * backward.dq_warpgroups, 256) if sm90 else (128, 128)
    preprocess = Kernel(
        Op.PREPROCESS, head_dim=head_dim, head_dim_v=head_dim_v, block_m=backward.block_m, **shared
    )
    postprocess_dq = Kernel(
        Op.POSTPROCESS, head_dim=head_dim, head_dim_v=head_dim, block_m=backward.block_m,
        threads=threads_dq,
        two_cta=backward.two_cta, atom_layout_m=backward.atom_layout_m, swap_ab=backward.swap_ab,
        **shared,
    )  # fmt: skip
    if not backward.grouped:
        return Satellites(preprocess, postprocess_dq, None, None)
    postprocess_dk = Kernel(  # the tile's rows are keys
        Op.POSTPROCESS, head_dim=head_dim, head_dim_v=head_dim, block_m=backward.block_n,
        threads=threads_dkv,
        cluster=2 if backward.two_cta else 1, atom_layout_m=backward.atom_layout_dkv if sm90 else 1,
        swap_ab=backward.swap_ab_dkv, **shared,
    )  # fmt: skip
    postprocess_dv = replace(postprocess_dk, head_dim=head_dim_v, head_dim_v=head_dim_v)
    return Satellites(preprocess, postprocess_dq, postprocess_dk, postprocess_dv)


def _kernels(wanted: Callable[[Kernel], bool]) -> tuple[Kernel, ...]:
    """The defaults and the wanted candidates, each once, in an order that is stable between
    runs."""
    kernels: dict[Kernel, None] = {}
    for arch, forward, backward in (
        (90, _forward_sm90, _backward_sm90),
        (100, _forward_sm100, _backward_sm100),
    ):
        for row in product(DTYPES, HEAD_DIM_BUCKETS[arch], (Layout.DENSE, Layout.VARLEN), Mask):
            defaults = list(forward(*row))
            for flags in product((False, True), repeat=2):  # grouped, deterministic
                defaults += backward(*row, *flags)
            for default in defaults:
                for kernel in (default, *filter(wanted, candidates(default))):
                    kernels[kernel] = None
                    if kernel.op is Op.BACKWARD:
                        kernels |= dict.fromkeys(
                            satellite for satellite in satellites(kernel) if satellite
                        )
    for row in product(DTYPES, HEAD_DIM_BUCKETS[90]):
        kernels |= dict.fromkeys(_decode_sm90(*row))
    for dtype in DTYPES:  # speed rules were measured on Hopper alone
        kernels[
            Kernel(Op.CLEAR, 90, dtype, *max(HEAD_DIM_BUCKETS[90]), Layout.VARLEN, block_m=0)
        ] = None
    return tuple(kernels)


def matrix() -> tuple[Kernel, ...]:
    """Every kernel of a wheel: the defaults, and the candidates that a tile rule names."""
    named = {
        (rule.op, rule.layout, rule.head_dim, rule.mask, rule.block_m, rule.block_n)
        for rule in rules.tile_rules()
    }
    return _kernels(
        lambda k: (
            (k.op.value, k.layout.value, k.head_dim, k.mask.value, k.block_m, k.block_n) in named
        )
    )


def with_candidates() -> tuple[Kernel, ...]:
    """Every kernel that a build can hold."""
    return _kernels(lambda candidate: True)


SUBSETS = {
    "full": lambda kernel: True,
    # A first look and the tests: the dtype and the head dims that most people train in, without the
    # deterministic backward.
    "core": lambda kernel: (
        kernel.dtype == "bf16"
        and (kernel.head_dim in (64, 128) or kernel.op is Op.CLEAR)
        and not kernel.deterministic
        and kernel.mask is not Mask.WINDOW
    ),
    # For tuning/tiles.py: what the candidates are measured beside, and all of them.
    "tuning": lambda kernel: (
        kernel.arch == 90 and not kernel.deterministic and kernel.mask is not Mask.WINDOW
    ),
}


def subset(name: str) -> tuple[Kernel, ...]:
    if name not in SUBSETS:
        raise ValueError(f"kernel subset {name!r} is unknown; allowed: {', '.join(SUBSETS)}")
    return tuple(
        kernel
        for kernel in (with_candidates() if name == "tuning" else matrix())
        if SUBSETS[name](kernel)
    )
