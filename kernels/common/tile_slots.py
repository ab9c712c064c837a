"""Which tile of packed sequences a CTA works on.

A grid has slots for the tiles of each sequence, which it finds by a search among cu_seqlens. So no
CTA adds up the tiles of all sequences before its own, as upstream's scheduler does, which takes
longer than the work where thousands of sequences are short.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from flash_attn.cute.tile_scheduler import WorkTileInfo

from kernels.common import packed
from kernels.common.packed import Offsets


class Place(NamedTuple):
    """Where a CTA's tile is."""

    head: Int32  # of a dense tensor: of all batch elements
    tile: Int32  # of its head (and sequence)
    tiles: Int32  # of its head (and sequence); 0 where the CTA has no tile
    sequence: Int32


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
        step = cute.ceil_div(count, cute.arch.WARP_SIZE)
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


class Scheduler(packed.Scheduler):
    """Upstream's scheduler, for kernels that work on one tile a CTA in any order."""

    @staticmethod
    def create(params, **_):
        slot, _, _ = cute.arch.block_idx()
        return Scheduler(params, slot, Int32(0))

    @staticmethod
    def get_grid_shape(params, **_):
        decoder = params.decoder
        slots = packed_slots(decoder.mCuSeqlensQ, decoder.tile_shape_mn[0])
        return slots * decoder.num_head, Int32(1), Int32(1)

    @cute.jit
    def _decode_work_tile(self) -> WorkTileInfo:
        decoder = self.params.decoder
        place = packed_place(self._tile_idx, decoder.mCuSeqlensQ, decoder.tile_shape_mn[0])
        found = (place.tile, place.head, place.sequence, Int32(0))
        return WorkTileInfo(found, place.tiles > 0)
