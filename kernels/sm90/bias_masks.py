"""Which key blocks a kernel with a bias works on, and the bias of its scores. Positions in a list
(kernels/sm90/bias.py) take the place of key blocks."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from quack import layout_utils

from kernels.common import symbolic
from kernels.kernel import Kernel
from kernels.sm90 import bias
from kernels.sm90.bias import BIASED, FREE, Bias
from kernels.sm90.masks import Edge, Masks, Span
from kernels.sm90.schedule import Tile

PAIRS = 8  # a thread has two of this many columns


class Bounds(NamedTuple):
    """What a thread knows of the bias of its scores."""

    list: tuple[Int32, Int32, Int32]  # batch, head, query tile
    rows: tuple[Int64, Int64]  # where its two rows of the bias begin, in elements
    column: Int32  # of its first score
    keys: Int32
    free_end: Int32  # positions
    biased_end: Int32


class BiasMasks(Masks):
    def __init__(self, kernel: Kernel, rows: int):
        super().__init__(kernel, rows)
        self.first_edge = Edge(biased=True)
        self.dtype, self.tile_m = symbolic.DTYPES[kernel.dtype], kernel.block_m

    def list_of(self, tile: Tile):
        return tile.batch, tile.head, tile.row // self.tile_m

    def block_at(self, tile: Tile, position, limits: Bias) -> Int32:
        return bias.entry(limits.lists, *self.list_of(tile), position)

    @cute.jit
    def key_bounds(self, tile: Tile, limits: Bias, group, thread, mma_qk) -> Bounds:
        where = mma_qk.get_slice(thread).partition_C(
            cute.make_identity_tensor((self.rows, self.tile_n))
        )
        where = layout_utils.reshape_acc_to_mn(where)
        rows = []
        for r in cutlass.range_constexpr(2):
            row = cutlass.min(tile.row + group * self.rows + where[r, 0][0], tile.rows - 1)
            rows.append(bias.row_of(limits.bias, tile.batch, tile.head, row))
        place = self.list_of(tile)
        free_end, biased_end = (limits.lists[(*place, kind)] for kind in (FREE, BIASED))
        return Bounds(place, tuple(rows), where[0, 0][1], tile.keys, free_end, biased_end)

    def spans(self, first, end, bounds: Bounds) -> list[Span]:
        free_end = cutlass.max(first, cutlass.min(bounds.free_end, end))
        biased_end = cutlass.max(free_end, cutlass.min(bounds.biased_end, end))
        return [
            Span(first, free_end),
            Span(free_end, biased_end, Edge(biased=True)),
            Span(biased_end, end, Edge()),
        ]

    def sees_all(self, bounds: Bounds, position):
        return position < bounds.free_end

    @cute.jit
    def fetch(self, position, bounds: Bounds, limits: Bias, edge: cutlass.Constexpr):
        """Reads the bias of a key block as `mask` takes it, two elements at a time. Beyond the last
        key it reads the last ones, so that nothing branches, which may stand beside products."""
        words = None
        if const_expr(edge.biased):
            words = cute.make_rmem_tensor((self.tile_n // PAIRS, 2), Int32)
            block = bias.entry(limits.lists, *bounds.list, position)
            first, last = block * self.tile_n + bounds.column, (bounds.keys - 1) // 2 * 2
            for r in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(self.tile_n // PAIRS):
                    key = cutlass.min(first + PAIRS * i, last)
                    words[i, r] = bias.pair(limits.bias, bounds.rows[r] + key)
        return words

    @cute.jit
    def mask(
        self, scores, position, bounds: Bounds, edge: cutlass.Constexpr, limits: Bias, fetched
    ):
        """Adds its bias to the scores of a key block, and hides keys beyond the last one."""
        block = bias.entry(limits.lists, *bounds.list, position)
        scores = layout_utils.reshape_acc_to_mn(scores)
        for r in cutlass.range_constexpr(2):
            if const_expr(edge.biased):
                values = cute.recast_tensor(fetched[None, r], self.dtype)
                for c in cutlass.range_constexpr(self.tile_n // PAIRS * 2):
                    scores[r, c] += bias.in_scores(values[c], limits.inverse_scale)
            self.hide(scores, r, bounds.keys - bounds.column - block * self.tile_n)
