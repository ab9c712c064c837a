"""Hopper's tiles, stages and register splits: one table an op, by bucket of head dims.

BACKWARD and BACKWARD_FULL are of flash-attn-4's kernel, with its choices (tile_size functions of
its interface.py); a test holds the two side by side. The other tables are of kernels of our own,
and have what was measured to be fastest on an H200 (docs/kernels-sm90.md). Shared memory is no
entry of a table: kernels/shared_memory.py computes it from the rest.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from kernels.kernel import HEAD_DIM_BUCKETS, Kernel, Layout, Mask, Op

HeadDims = tuple[int, int]
Row = dict[str, Any]  # fields of a Kernel

WARPGROUP_ROWS = 64  # query rows of a warpgroup: WGMMA's M

# At D 64 a score costs as much in exp as in matrix work, so three warpgroups overlap more than two.
# From D 96 on, three warpgroups with 128 keys spill. With two query tiles in shared memory the next
# one is loaded early; the key and value stages fill the rest, as far as more helped. From D 192 on
# there is room for one query tile and two stages; of the key blocks that fit, the sizes that divide
# most lengths were faster than the largest.
FORWARD: dict[HeadDims, Row] = {
    (64, 64): dict(block_m=192, block_n=128, stages=3, q_stages=2),
    (96, 96): dict(block_m=128, block_n=128, stages=2, q_stages=2),
    (128, 128): dict(block_m=128, block_n=128, stages=2, q_stages=2),
    (192, 128): dict(block_m=128, block_n=128, stages=2, q_stages=1),
    (192, 192): dict(block_m=128, block_n=96, stages=2, q_stages=1),
    (256, 256): dict(block_m=128, block_n=64, stages=2, q_stages=1),
}
# These tiles are for up to 64 queries, the rows of one warpgroup. Many such sequences take as long
# as reading them, so shared memory is filled with stages, of Q too, until more did not help.
SHORT_FORWARD: dict[HeadDims, Row] = {
    (64, 64): dict(block_m=64, block_n=64, stages=6, q_stages=4),
    (96, 96): dict(block_m=64, block_n=64, stages=6, q_stages=3),
    (128, 128): dict(block_m=64, block_n=64, stages=5, q_stages=3),
    (192, 128): dict(block_m=64, block_n=64, stages=3, q_stages=2),
    (192, 192): dict(block_m=64, block_n=64, stages=3, q_stages=2),
    (256, 256): dict(block_m=64, block_n=64, stages=2, q_stages=2),
}
# With a bias, tiles are multiples of the 64 x 64 elements that a map tells of.
FORWARD_BIAS: dict[HeadDims, Row] = FORWARD | {
    (64, 64): dict(block_m=128, block_n=128, stages=4, q_stages=2),
    (192, 192): dict(block_m=128, block_n=64, stages=3, q_stages=1),
}
# Registers of a consuming and of a loading thread, by the number of consuming warpgroups:
# setmaxnreg divides an SM's 65,536 registers in steps of 8. Finding the tiles of packed sequences
# takes more than 24.
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

# Most steps of decoding have up to 16 rows, queries times the query heads that share a key/value
# head; speculating steps and chunks of prompts have more. A key block has 24 KB or more (16 KB at
# D 64 and 64 rows), so that its bytes take longer to arrive than it takes to compute with them. The
# stages fill half of an SM's shared memory, so that two CTAs fit; from D 192 on they fill all of
# it, for one CTA.
DECODE: dict[HeadDims, tuple[Row, ...]] = {
    (64, 64): (
        dict(block_m=16, block_n=128, stages=3, ctas_per_sm=2),
        dict(block_m=64, block_n=64, stages=5, ctas_per_sm=2),
    ),
    (96, 96): (
        dict(block_m=16, block_n=64, stages=4, ctas_per_sm=2),
        dict(block_m=64, block_n=64, stages=3, ctas_per_sm=2),
    ),
    (128, 128): (
        dict(block_m=16, block_n=64, stages=3, ctas_per_sm=2),
        dict(block_m=64, block_n=64, stages=2, ctas_per_sm=2),
    ),
    (192, 128): (
        dict(block_m=16, block_n=64, stages=5, ctas_per_sm=1),
        dict(block_m=64, block_n=64, stages=4, ctas_per_sm=1),
    ),
    (192, 192): (
        dict(block_m=16, block_n=64, stages=4, ctas_per_sm=1),
        dict(block_m=64, block_n=64, stages=3, ctas_per_sm=1),
    ),
    (256, 256): (
        dict(block_m=16, block_n=64, stages=3, ctas_per_sm=1),
        dict(block_m=64, block_n=64, stages=2, ctas_per_sm=1),
    ),
}

# Shared memory holds two tiles of Q, and two of dO where dO is small. With dq_warpgroups=1 one
# warpgroup computes the 64 rows of dQ. From D 192 on the key blocks that fit beside dQ's tile are
# no multiples of 64, so dK and dV are computed transposed, with head_dim on WGMMA's M.
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
}  # fmt: skip
# 80 rows fill shared memory; masked tiles waste less at 64. WGMMA's M is 64: 80 rows go on its N.
BACKWARD_FULL: dict[HeadDims, Row] = {(128, 128): dict(block_m=80, swap_ab=True)}
# At D 256 the accumulators of dK, dV and dQ leave one pass key blocks of 48, for which it reads so
# much of shared memory that the tensor cores wait. Two passes compute S and dP twice, have key
# blocks of 64, and need no accumulators in memory.
BACKWARD_QUERIES: dict[HeadDims, Row] = {
    (256, 256): dict(block_m=128, block_n=64, stages=2, v_stages=1),
}
BACKWARD_KEYS: dict[HeadDims, Row] = {
    (256, 256): dict(block_m=64, block_n=64, q_stages=2, do_stages=2),
}
# GQA, MQA and packed MHA also have a kernel whose CTAs work on all query heads of their keys. It
# needs no accumulators of dK and dV, and has long loops where sequences are short. Shared memory
# would hold more stages, but a third one made D 128 slower.
BACKWARD_GROUPS: dict[HeadDims, Row] = {
    (64, 64): dict(block_m=64, block_n=128, q_stages=4, do_stages=4),
    (128, 128): dict(block_m=64, block_n=128, q_stages=2, do_stages=2),
}
# The backward with a bias has two passes at every head dim, with up to three stages of K and two of
# V. Up to D 192 more would fit; they were not measured.
BACKWARD_QUERIES_BIAS: dict[HeadDims, Row] = BACKWARD_QUERIES | {
    (64, 64): dict(block_m=128, block_n=64, stages=3, v_stages=2),
    (96, 96): dict(block_m=128, block_n=64, stages=3, v_stages=2),
    (128, 128): dict(block_m=128, block_n=64, stages=3, v_stages=2),
    (192, 128): dict(block_m=128, block_n=64, stages=3, v_stages=2),
    (192, 192): dict(block_m=128, block_n=64, stages=2, v_stages=2),
}
# The warps that load read lists, too, which takes more than 24 registers.
LISTS_REGISTERS: Row = dict(consumer_registers=224, producer_registers=56)
BACKWARD_KEYS_BIAS: dict[HeadDims, Row] = {
    **{
        head_dims: dict(
            block_m=64, block_n=64, q_stages=3, do_stages=3, stages=2, **LISTS_REGISTERS
        )
        for head_dims in ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192))
    },
    (256, 256): BACKWARD_KEYS[(256, 256)] | LISTS_REGISTERS | dict(stages=2),
}
# Shared memory has room for one stage of the bias.
BACKWARD_KEYS_BIAS[(192, 192)] |= dict(stages=1)
# In our own backwards two warpgroups compute, and one loads.
BACKWARD_REGISTERS: Row = dict(consumer_registers=240, producer_registers=24)
# Other tiles that a default may lose to, by bucket and mask. Tiles of fewer query rows leave fewer
# rows empty in short sequences, in a sequence's last tile and in the last wave: at ViT's 197
# queries, half of the rows of 192-row tiles are empty. Fewer keys waste less of short sequences and
# of the diagonal; more keys mean fewer steps. What the registers and shared memory hold is as in
# upstream's sm90_config_search.py. 96 rows are no multiple of 64 and go on WGMMA's N.
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
    rows: tuple[Row, ...] = (FORWARD[head_dims], SHORT_FORWARD[head_dims])
    if mask is Mask.BIAS:
        rows = (FORWARD_BIAS[head_dims],)
    for row in rows:
        row = row | registers(layout, row["block_m"])
        yield Kernel(Op.FORWARD, 90, dtype, *head_dims, layout, mask=mask, **row)


def paged_forward(dtype: str, head_dims: HeadDims) -> Iterator[Kernel]:
    """The forwards of keys and values in pages, one for each mask: a bias has no pages. They have
    the large tile alone, because few queries run the decode kernel."""
    row = FORWARD[head_dims]
    row = row | registers(Layout.VARLEN, row["block_m"])  # tiles are found alike
    for mask in (Mask.FULL, Mask.CAUSAL, Mask.WINDOW):
        yield Kernel(Op.FORWARD, 90, dtype, *head_dims, Layout.PAGED, mask=mask, **row)


def decode(dtype: str, head_dims: HeadDims) -> Iterator[Kernel]:
    for row in DECODE[head_dims]:
        yield Kernel(Op.DECODE, 90, dtype, *head_dims, Layout.ANY, **row)


def backward(
    dtype: str,
    head_dims: HeadDims,
    layout: Layout,
    mask: Mask,
    grouped: bool,
    deterministic: bool,
) -> Iterator[Kernel]:
    if mask is Mask.BIAS or head_dims in BACKWARD_KEYS:
        yield backward_keys(dtype, head_dims, layout, mask)
        return
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


def backward_groups(dtype: str, head_dims: HeadDims) -> Iterator[Kernel]:
    if head_dims in BACKWARD_GROUPS:
        row = BACKWARD_GROUPS[head_dims] | BACKWARD_REGISTERS
        for layout, mask in product((Layout.DENSE, Layout.VARLEN), (Mask.FULL, Mask.CAUSAL)):
            yield Kernel(Op.BACKWARD_GROUPS, 90, dtype, *head_dims, layout, mask=mask, **row)


def backward_keys(dtype: str, head_dims: HeadDims, layout: Layout, mask: Mask) -> Kernel:
    """The second pass of a backward, which is planned. It serves any ratio of heads, and adds up
    in the same order always."""
    if mask is Mask.BIAS:
        row = BACKWARD_KEYS_BIAS[head_dims]
    else:
        row = BACKWARD_KEYS[head_dims] | BACKWARD_REGISTERS
    return Kernel(Op.BACKWARD_KEYS, 90, dtype, *head_dims, layout, mask=mask, **row)


def backward_queries(keys: Kernel) -> Kernel:
    """The first pass, which is launched before a second."""
    head_dims = (keys.head_dim, keys.head_dim_v)
    rows = BACKWARD_QUERIES_BIAS if keys.mask is Mask.BIAS else BACKWARD_QUERIES
    row = rows[head_dims] | BACKWARD_REGISTERS
    return Kernel(
        Op.BACKWARD_QUERIES, 90, keys.dtype, *head_dims, keys.layout, mask=keys.mask, **row
    )


def maps(kernel: Kernel) -> tuple[Kernel, ...]:
    """What is launched before a forward with a bias, or before both passes of a backward with
    one: lists of tiles for each query tile, and in a backward for each key block, too. The head
    dims mean nothing to them."""
    head_dims = max(HEAD_DIM_BUCKETS[90])
    queries = backward_queries(kernel) if kernel.op is Op.BACKWARD_KEYS else kernel
    lists = Kernel(
        Op.MAP_QUERIES, 90, kernel.dtype, *head_dims, Layout.DENSE, queries.block_m, queries.block_n
    )
    if kernel.op is Op.FORWARD:
        return (lists,)
    return lists, replace(lists, op=Op.MAP_KEYS, block_m=kernel.block_m, block_n=kernel.block_n)


def candidates(default: Kernel) -> tuple[Kernel, ...]:
    """The kernels that are measured beside a default. There are none unless its head dims are equal
    and it may add up in any order, and none in pages."""
    if default.head_dim != default.head_dim_v or default.deterministic:
        return ()
    if default.layout is Layout.PAGED:
        return ()
    rows: tuple[Row, ...] = ()
    measured = default.mask in (Mask.FULL, Mask.CAUSAL)
    if default.op is Op.BACKWARD:
        rows = BACKWARD_CANDIDATES.get((default.head_dim, default.mask), ())
    elif default.op is Op.FORWARD and measured and default.block_m > 64:
        found = FORWARD_CANDIDATES.get(default.head_dim, ())
        rows = tuple(row | registers(default.layout, row["block_m"]) for row in found)
    return tuple(replace(default, tuned=True, **row) for row in rows)
