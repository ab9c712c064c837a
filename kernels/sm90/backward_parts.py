"""What the two passes of the SM90 backward have in common: which tile a CTA works on, and how they
take a row's logsumexp. Each CTA has one tile."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from kernels.common.packed import Offsets
from kernels.sm90.softmax import LOG2_E
from kernels.sm90.warpgroups import WARP

# Heads whose rows take this many bytes are in work at a time: what a CTA reads block by block then
# stays in L2, which has 50 MB, beside what is read and written once.
IN_L2 = 32 << 20
# A logsumexp farther from zero than this is rounded to sixteenths or more, because of a large bias.
# Probabilities computed from it would be wrong by 4% or more, or infinite.
FARTHEST_LOGSUMEXP = 2.0**20


class Place(NamedTuple):
    """Where a CTA's tile is."""

    head: Int32  # of a dense tensor: of all batch elements
    tile: Int32  # of its head (and sequence)
    tiles: Int32  # of its head (and sequence); 0 where the CTA has no tile
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


def packed_slots(offsets: Offsets, tile_rows: int) -> Int32:
    """The number of slots for the tiles of a head of packed sequences: `first_slot` of a sequence
    behind the last one, at most."""
    return offsets.total // tile_rows + offsets.shape[0] - 1


def first_slot(offsets: Offsets, sequence: Int32, tile_rows: int) -> Int32:
    """A sequence's first slot: the number of whole tiles before the sequence, and a slot more for
    each sequence before it. So all tiles have a slot, and no lengths need be summed up."""
    return offsets[sequence] // tile_rows + sequence


@cute.jit
def packed_place(cta: Int32, offsets: Offsets, tile_rows: cutlass.Constexpr) -> Place:
    """The place of a tile of packed sequences, head by head. A whole warp looks for the sequence,
    the last one whose first slot is not behind the CTA's: 32 at a time, where cu_seqlens decreases
    any."""
    slots = packed_slots(offsets, tile_rows)
    head, slot = cta // slots, cta % slots
    lane = cute.arch.lane_idx()
    sequence, count = Int32(0), offsets.shape[0] - 1
    while count > 1:
        step = cute.ceil_div(count, WARP)
        begun = False
        if lane * step < count:
            begun = first_slot(offsets, sequence + lane * step, tile_rows) <= slot
        passed = cutlass.max(cute.arch.popc(cute.arch.vote_ballot_sync(begun)) - 1, 0) * step
        sequence += passed
        count = cutlass.min(step, count - passed)
    sequence = cute.arch.make_warp_uniform(sequence)
    rows = cutlass.max(offsets[sequence + 1] - offsets[sequence], 0)
    tile, tiles = slot - first_slot(offsets, sequence, tile_rows), cute.ceil_div(rows, tile_rows)
    return Place(head, tile, tiles if tile >= 0 and tile < tiles else 0, sequence)


@cute.jit
def base_2(lse: Float32, biased: cutlass.Constexpr = False) -> Float32:
    """A row's logsumexp in base 2. That of a row without keys, minus infinity, becomes plus
    infinity, which makes its probabilities zero. With a bias, so does one that says nothing of the
    scores."""
    none = lse == -Float32.inf
    if const_expr(biased):
        none = lse < -FARTHEST_LOGSUMEXP or lse > FARTHEST_LOGSUMEXP
    return Float32.inf if none else lse * LOG2_E


@cute.jit
def zero_after(exponentials: cute.Tensor) -> Int32:
    """Zero, which is known once all the exponentials are: none is minus zero. Where products wait
    for it, the compiler cannot compute exponentials between them, which would stretch a turn."""
    words, bits = cute.recast_tensor(exponentials, Int32), Int32(0)
    for i in cutlass.range_constexpr(cute.size(words)):
        bits = bits | words[i]
    return Int32(bits == -(1 << 31))
