"""What the two passes of the SM90 backward have in common: which tile a CTA works on, and how its
warpgroups take turns. Each CTA has one tile."""

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from flash_attn.cute import utils

from kernels.common.packed import Offsets
from kernels.sm90.barriers import Barrier

WARP = 32
WARPGROUP = 128  # threads
ROWS = 64  # of a warpgroup: WGMMA's M
LOG2_E = math.log2(math.e)
# Heads whose rows take this many bytes are in work at a time: what a CTA reads block by block then
# stays in L2, which has 50 MB, beside what is read and written once.
IN_L2 = 32 << 20


class Place(NamedTuple):
    """Where a CTA's tile is."""

    head: Int32  # of a dense tensor: of all batch elements
    tile: Int32  # of its head (and sequence)
    tiles: Int32  # so many has the head (and sequence); 0 where the CTA has no tile
    sequence: Int32


def heads_in_l2(rows, bytes_of_row):
    """How many heads of so many rows are in work at a time."""
    return cutlass.max(IN_L2 // bytes_of_row // cutlass.max(rows, 1), 1)


@cute.jit
def dense_place(cta: Int32, tiles: Int32, heads: Int32, together: Int32) -> Place:
    """The place of a dense tensor's tile. Heads are in work in sections of `together`. A section
    begins with the first tile of each of its heads, so a kernel that counts the costliest tile as
    the first has LPT order in every section."""
    together = cutlass.min(together, heads)
    section, rest = cta // (tiles * together), cta % (tiles * together)
    first = section * together
    heads = cutlass.min(heads - first, together)
    return Place(first + rest % heads, rest // heads, tiles, Int32(0))


def packed_grid(offsets: Offsets, tile_rows: int, heads: Int32) -> Int32:
    """At least the number of tiles of packed sequences, of which only the total is known."""
    return (offsets.total + (offsets.shape[0] - 1) * (tile_rows - 1)) // tile_rows * heads


@cute.jit
def packed_place(cta: Int32, offsets: Offsets, tile_rows: cutlass.Constexpr, heads: Int32) -> Place:
    """The place of a tile of packed sequences: sequence by sequence, and in each head by head. A
    whole warp looks for it, a sequence in each lane."""
    lane, batch = cute.arch.lane_idx(), offsets.shape[0] - 1
    tiles, through = Int32(0), Int32(0)
    group, before, after = Int32(-WARP), Int32(0), Int32(0)
    while after <= cta and group + WARP < batch:
        group += WARP
        before = after
        tiles = cute.ceil_div(rows_of_sequence(offsets, group + lane, batch), tile_rows)
        through = utils.warp_prefix_sum(tiles * heads, lane)
        after = before + cute.arch.shuffle_sync(through, WARP - 1)
    lane_of = cute.arch.popc(cute.arch.vote_ballot_sync(through <= cta - before))
    place = cta - before - cute.arch.shuffle_sync(through - tiles * heads, lane_of)
    tiles = cute.arch.shuffle_sync(tiles, lane_of) if cta < after else Int32(0)
    divisor = cutlass.max(tiles, 1)
    sequence = cutlass.max(cutlass.min(group + lane_of, batch - 1), 0)
    return Place(place // divisor, place % divisor, tiles, sequence)


@cute.jit
def rows_of_sequence(offsets: Offsets, index: Int32, batch: Int32) -> Int32:
    """A sequence that ends before it begins has no rows, nor has one that there isn't."""
    rows = Int32(0)
    if index < batch:
        rows = cutlass.max(offsets[index + 1] - offsets[index], 0)
    return rows


@cute.jit
def base_2(lse: Float32) -> Float32:
    """A row's logsumexp in base 2. That of a row without keys, minus infinity, becomes plus
    infinity, which makes its probabilities zero."""
    return Float32.inf if lse == -Float32.inf else lse * LOG2_E


@cute.jit
def zero_after(exponentials: cute.Tensor) -> Int32:
    """Zero, which is known once all the exponentials are: none is minus zero. Where products wait
    for it, the compiler cannot compute exponentials between them, which would stretch a turn."""
    words, bits = cute.recast_tensor(exponentials, Int32), Int32(0)
    for i in cutlass.range_constexpr(cute.size(words)):
        bits = bits | words[i]
    return Int32(bits == -(1 << 31))


class Turns:
    """Warpgroups take turns to issue products, so that the products of one are queued at a time,
    while the others compute what lies between products."""

    def __init__(self, warpgroups: int, taken: bool):
        self.warpgroups, self.taken = warpgroups, taken and warpgroups > 1

    @cute.jit
    def begin(self, warpgroup):
        """The first turn is the first warpgroup's."""
        if const_expr(self.taken):  # noqa: SIM102, at compile time, the other at run time
            if warpgroup == 0:
                self._signal(warpgroup)

    def wait(self, warpgroup, known=0):
        """`known` is zero. Where the compiler does not know that, it lets no turn begin before."""
        if const_expr(self.taken):
            cute.arch.barrier(
                barrier_id=Barrier.WARPGROUP_1 + warpgroup + known,
                number_of_threads=2 * WARPGROUP,
            )

    def end(self, warpgroup):
        """It is the next warpgroup's turn."""
        if const_expr(self.taken):
            self._signal((warpgroup + 1) % self.warpgroups)

    def _signal(self, warpgroup):
        cute.arch.barrier_arrive(
            barrier_id=Barrier.WARPGROUP_1 + warpgroup, number_of_threads=2 * WARPGROUP
        )
