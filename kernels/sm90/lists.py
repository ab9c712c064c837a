"""How a warp writes a list of tiles (kernels/sm90/bias.py says what it is)."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from kernels.sm90.bias import ALL, BIASED, FREE, HEADER
from kernels.sm90.warpgroups import WARP

# What is known of a tile: that it is in no list, or why it is in one. The last is a key block that
# the end of the keys cuts short, and of which nothing else is hidden.
HIDDEN_TILE, BIASED_TILE, FREE_TILE, CUT_TILE = range(4)


class Place(NamedTuple):
    """Where a list is."""

    batch: Int32
    head: Int32
    index: Int32


class Lister:
    """Subclasses say of which kind a tile is: kind(cells, place, tile, keys)."""

    @cute.jit
    def write(self, cells: cute.Tensor, lists: cute.Tensor, place: Place, tiles: Int32, keys: Int32):
        """Lists those of the first `tiles` that are not hidden. One warp does it. A list without
        tiles gets one that is hidden."""
        lane = cute.arch.lane_idx()
        list_ = lists[place.batch, place.head, place.index, None]
        free, biased, cut = Int32(0), Int32(0), Int32(0)
        for first in cutlass.range(0, tiles, WARP, unroll=1):
            kind = self.kind_of_existing(cells, place, first + lane, tiles, keys)
            free += cute.arch.popc(cute.arch.vote_ballot_sync(kind == FREE_TILE))
            biased += cute.arch.popc(cute.arch.vote_ballot_sync(kind == BIASED_TILE))
            cut += cute.arch.popc(cute.arch.vote_ballot_sync(kind == CUT_TILE))
        biased_end = free + biased
        free_at, biased_at = Int32(HEADER), HEADER + free
        earlier_lanes = (Int32(1) << lane) - 1
        for first in cutlass.range(0, tiles, WARP, unroll=1):
            tile = first + lane
            kind = self.kind_of_existing(cells, place, tile, tiles, keys)
            frees = cute.arch.vote_ballot_sync(kind == FREE_TILE)
            biaseds = cute.arch.vote_ballot_sync(kind == BIASED_TILE)
            if kind == FREE_TILE:
                list_[free_at + cute.arch.popc(frees & earlier_lanes)] = tile
            if kind == BIASED_TILE:
                list_[biased_at + cute.arch.popc(biaseds & earlier_lanes)] = tile
            if kind == CUT_TILE:
                list_[HEADER + biased_end] = tile
            free_at += cute.arch.popc(frees)
            biased_at += cute.arch.popc(biaseds)
        if lane == 0:
            everything = biased_end + cut
            if everything == 0:
                list_[HEADER] = Int32(0)
                biased_end, everything = Int32(1), Int32(1)
            list_[FREE] = free
            list_[BIASED] = biased_end
            list_[ALL] = everything

    @cute.jit
    def kind_of_existing(self, cells: cute.Tensor, place: Place, tile, tiles, keys) -> Int32:
        kind = Int32(HIDDEN_TILE)
        if tile < tiles:
            kind = self.kind(cells, place, tile, keys)
        return kind
