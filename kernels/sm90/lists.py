"""How a warp writes a list of tiles (kernels/sm90/bias.py says what it is)."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from kernels.sm90.bias import ALL, CAREFUL, HEADER
from kernels.sm90.warpgroups import WARP

# What is known of a tile: the kind that it has in a list, in the order of the kinds there, or that
# it is in none.
FREE_TILE, BIASED_TILE, CAREFUL_TILE, CUT_TILE, HIDDEN_TILE = range(5)
KINDS = ALL + 1


class List(NamedTuple):
    """Where a list is, and how many tiles it may have."""

    batch: Int32
    head: Int32
    index: Int32
    tiles: Int32
    keys: Int32 | None = None  # of the problem, where kinds depend on it


class Lister:
    """Subclasses say of which kind a tile is: kind(cells, of, tile)."""

    @cute.jit
    def write(self, cells: cute.Tensor, lists: cute.Tensor, of: List):
        """Lists the tiles that are not hidden. One warp does it. A list without tiles gets one that
        is hidden."""
        lane = cute.arch.lane_idx()
        list_ = lists[of.batch, of.head, of.index, None]
        # of the tiles of each kind: their number, then the position of the next one
        counts = cute.make_rmem_tensor(KINDS, Int32)
        counts.fill(0)
        for first in cutlass.range(0, of.tiles, WARP, unroll=1):
            kind = self.kind_of_existing(cells, of, first + lane)
            for i in cutlass.range_constexpr(KINDS):
                counts[i] += cute.arch.popc(cute.arch.vote_ballot_sync(kind == i))
        end = Int32(0)
        for i in cutlass.range_constexpr(KINDS):
            begin = end
            end += counts[i]
            counts[i] = begin
            if lane == 0:
                list_[i] = end
        earlier_lanes = (Int32(1) << lane) - 1
        for first in cutlass.range(0, of.tiles, WARP, unroll=1):
            tile = first + lane
            kind = self.kind_of_existing(cells, of, tile)
            for i in cutlass.range_constexpr(KINDS):
                alike = cute.arch.vote_ballot_sync(kind == i)
                if kind == i:
                    list_[HEADER + counts[i] + cute.arch.popc(alike & earlier_lanes)] = tile
                counts[i] += cute.arch.popc(alike)
        if end == 0 and lane == 0:
            list_[HEADER] = Int32(0)
            for i in cutlass.range_constexpr(KINDS):
                list_[i] = Int32(1 if i >= CAREFUL else 0)

    @cute.jit
    def kind_of_existing(self, cells: cute.Tensor, of: List, tile: Int32) -> Int32:
        kind = Int32(HIDDEN_TILE)
        if tile < of.tiles:
            kind = self.kind(cells, of, tile)
        return kind
