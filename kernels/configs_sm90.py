"""Hopper's tiles, stages and register splits: one table an op, by bucket of head dims.

The forward and the decode kernel are our own, and have what was measured to be fastest on an H200
(docs/kernels-sm90.md). The backward is flash-attn-4's and has its choices (tile_size functions of
its interface.py); a test holds the two side by side. Shared memory is no entry of a table:
kernels/shared_memory.py computes it from the rest.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kernels.kernel import Kernel, Layout, Mask, Op

HeadDims = tuple[int, int]
Row = dict[str, Any]  # fields of a Kernel

WARPGROUP_ROWS = 64  # query rows of a warpgroup: WGMMA's M

# D 64: a score costs as much in exp as in matrix work, so three warpgroups overlap more than two;
# from D 96 on three spill beside as many keys. Two query tiles let the next one's load begin early,
# and the stages fill what is left of shared memory, up to where more did not help. From D 192 on it
# holds one query tile, beside keys in two stages; of the key blocks that fit, the sizes that divide
# most lengths were faster than the largest.
FORWARD: dict[HeadDims, Row] = {
    (64, 64): dict(block_m=192, block_n=128, stages=3, q_stages=2),
    (96, 96): dict(block_m=128, block_n=128, stages=2, q_stages=2),
    (128, 128): dict(block_m=128, block_n=128, stages=2, q_stages=2),
    (192, 128): dict(block_m=128, block_n=128, stages=2, q_stages=1),
    (192, 192): dict(block_m=128, block_n=96, stages=2, q_stages=1),
    (256, 256): dict(block_m=128, block_n=64, stages=2, q_stages=1),
}
# For up to 64 queries, one warpgroup's rows. Where there are many such sequences their time is that
# of reading them: the stages, of queries too, are what shared memory holds, or enough of it.
SHORT_FORWARD: dict[HeadDims, Row] = {
    (64, 64): dict(block_m=64, block_n=64, stages=6, q_stages=4),
    (96, 96): dict(block_m=64, block_n=64, stages=6, q_stages=3),
    (128, 128): dict(block_m=64, block_n=64, stages=5, q_stages=3),
    (192, 128): dict(block_m=64, block_n=64, stages=3, q_stages=2),
    (192, 192): dict(block_m=64, block_n=64, stages=3, q_stages=2),
    (256, 256): dict(block_m=64, block_n=64, stages=2, q_stages=2),
}
# Registers of a consuming and of a loading thread, by the number of consuming warpgroups, as
# setmaxnreg, in steps of 8, can divide an SM's 65,536. Finding the tiles of packed sequences takes
# more than 24.
FORWARD_REGISTERS = {
    Layout.DENSE: {1: (240, 56), 2: (240, 24), 3: (160, 32)},
    Layout.VARLEN: {1: (240, 56), 2: (232, 40), 3: (160, 32)},
}
# Other tiles that a default may lose to, by bucket. One warpgroup, 64 rows, is for problems of few
# tiles or short sequences. Two do better at D 64 without pingpong. Three, for long sequences at
# D 96, have registers for 112 keys.
FORWARD_CANDIDATES: dict[int, tuple[Row, ...]] = {
    64: (
        dict(block_m=128, block_n=128, stages=4, q_stages=2, pingpong=False),
        dict(block_m=64, block_n=128, stages=4, q_stages=2),
    ),
    96: (
        dict(block_m=64, block_n=128, stages=3, q_stages=2),
        dict(block_m=192, block_n=112, stages=2, q_stages=2),
    ),
    128: (dict(block_m=64, block_n=128, stages=2, q_stages=2),),
}

# One warpgroup's rows. A key block has 16 KB at least, so that a few in flight hide the memory's
# latency, and the stages fill what two CTAs leave each other of an SM; from D 192 on it holds one.
DECODE: dict[HeadDims, Row] = {
    (64, 64): dict(block_m=64, block_n=128, stages=3, ctas_per_sm=2),
    (96, 96): dict(block_m=64, block_n=64, stages=4, ctas_per_sm=2),
    (128, 128): dict(block_m=64, block_n=64, stages=3, ctas_per_sm=2),
    (192, 128): dict(block_m=64, block_n=64, stages=5, ctas_per_sm=1),
    (192, 192): dict(block_m=64, block_n=64, stages=4, ctas_per_sm=1),
    (256, 256): dict(block_m=64, block_n=64, stages=3, ctas_per_sm=1),
}

# Shared memory holds two tiles of Q and, of the rest, two of a small dO at most. 64 rows of dQ are
# one warpgroup's. From D 192 on it holds key blocks beside dQ's tile that are no multiples of 64:
# head_dim goes on WGMMA's M.
BACKWARD: dict[HeadDims, Row] = {
    (64, 64): dict(
        block_m=128, block_n=128, atom_layout_m=2,
        q_stages=2, do_stages=2, pds_stages=2, swap_ab_sdp=True,
    ),
    (96, 96): dict(
        block_m=64, block_n=128, dq_warpgroups=1,
        q_stages=2, do_stages=2, pds_stages=2, swap_ab_sdp=True,
    ),
    (128, 128): dict(
        block_m=64, block_n=128,
        q_stages=2, do_stages=2, pds_stages=2, swap_ab_sdp=True,
    ),
    (192, 128): dict(
        block_m=64, block_n=96, swap_ab_dkv=True,
        q_stages=2, do_stages=2, pds_stages=1,
    ),
    (192, 192): dict(
        block_m=64, block_n=96, swap_ab_dkv=True,
        q_stages=2, do_stages=1, pds_stages=1,
    ),
    (256, 256): dict(
        block_m=64, block_n=48, swap_ab_dkv=True, atom_layout_dkv=1,
        q_stages=2, do_stages=1, pds_stages=1,
    ),
}  # fmt: skip
# 80 rows fill shared memory; masked tiles waste less at 64. WGMMA's M is 64: 80 rows go on its N.
BACKWARD_FULL: dict[HeadDims, Row] = {(128, 128): dict(block_m=80, swap_ab=True)}
# Other tiles that a default may lose to, by bucket and mask. Fewer query rows waste less of short
# sequences, of the last tile and of the last wave: 192 rows are half empty at ViT's 197. Fewer keys
# waste less of short sequences and of the diagonal; more keys mean fewer steps. What the registers
# and shared memory hold is as in upstream's sm90_config_search.py. 96 rows are no multiple of 64
# and go on WGMMA's N.
SWAPPED_96: Row = dict(block_m=96, block_n=128, swap_ab=True)
BACKWARD_CANDIDATES: dict[tuple[int, Mask], tuple[Row, ...]] = {
    (64, Mask.FULL): (dict(block_m=64, atom_layout_m=1), SWAPPED_96),
    (64, Mask.CAUSAL): (dict(block_m=64, atom_layout_m=1), SWAPPED_96),
    (128, Mask.FULL): (dict(block_m=64, swap_ab=False),),
}


def registers(layout: Layout, block_m: int) -> Row:
    consumer, producer = FORWARD_REGISTERS[layout][block_m // WARPGROUP_ROWS]
    return dict(consumer_registers=consumer, producer_registers=producer)


def forward(dtype: str, head_dims: HeadDims, layout: Layout, mask: Mask) -> Iterator[Kernel]:
    for row in (FORWARD[head_dims], SHORT_FORWARD[head_dims]):
        row = row | registers(layout, row["block_m"])
        yield Kernel(Op.FORWARD, 90, dtype, *head_dims, layout, mask=mask, **row)


def decode(dtype: str, head_dims: HeadDims) -> Kernel:
    return Kernel(Op.DECODE, 90, dtype, *head_dims, Layout.ANY, **DECODE[head_dims])


def backward(
    dtype: str,
    head_dims: HeadDims,
    layout: Layout,
    mask: Mask,
    grouped: bool,
    deterministic: bool,
) -> Iterator[Kernel]:
    row = BACKWARD[head_dims]
    if mask is Mask.FULL:
        row = row | BACKWARD_FULL.get(head_dims, {})
    yield Kernel(
        Op.BACKWARD,
        90,
        dtype,
        *head_dims,
        layout,
        mask=mask,
        grouped=grouped,
        deterministic=deterministic,
        **row,
    )


def candidates(default: Kernel) -> tuple[Kernel, ...]:
    """The kernels that are measured beside a default. There are none unless its head dims are equal
    and it may add up in any order."""
    if default.head_dim != default.head_dim_v or default.deterministic:
        return ()
    rows: tuple[Row, ...] = ()
    if default.op is Op.BACKWARD:
        rows = BACKWARD_CANDIDATES.get((default.head_dim, default.mask), ())
    elif default.op is Op.FORWARD and default.mask is not Mask.WINDOW and default.block_m > 64:
        found = FORWARD_CANDIDATES.get(default.head_dim, ())
        rows = tuple(row | registers(default.layout, row["block_m"]) for row in found)
    return tuple(replace(default, tuned=True, **row) for row in rows)
