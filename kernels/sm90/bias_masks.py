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
from kernels.sm90.bias import BIASED, CAREFUL, FREE, Bias
from kernels.sm90.masks import Edge, Masks, Span
from kernels.sm90.schedule import Tile

COLUMNS = 8  # of these a thread has two
SECTOR = 16  # elements that memory gives at least
LINE = 4 * SECTOR  # that the four threads of a row bring together


class BiasBounds(NamedTuple):
    """What a thread knows of the bias of its scores."""

    list_: tuple[Int32, Int32, Int32]  # batch, head, query tile
    rows: tuple[Int64, Int64]  # where its two rows of the bias begin, in elements
    column: Int32  # of its first score
    keys: Int32
    free_end: Int32  # positions
    biased_end: Int32
    careful_end: Int32


class BiasMasks(Masks):
    def __init__(self, kernel: Kernel, rows: int):
        super().__init__(kernel, rows)
        self.first_edge = Edge(biased=True, careful=True)
        self.dtype, self.tile_m = symbolic.DTYPES[kernel.dtype], kernel.block_m

    def list_of(self, tile: Tile):
        return tile.batch, tile.head, tile.row // self.tile_m

    def block_at(self, tile: Tile, position, visibility: Bias) -> Int32:
        return bias.entry(visibility.lists, *self.list_of(tile), position)

    @cute.jit
    def key_bounds(self, tile: Tile, visibility: Bias, group, thread, mma_qk) -> BiasBounds:
        where = mma_qk.get_slice(thread).partition_C(
            cute.make_identity_tensor((self.rows, self.tile_n))
        )
        where = layout_utils.reshape_acc_to_mn(where)
        rows = []
        for r in cutlass.range_constexpr(2):
            row = cutlass.min(tile.row + group * self.rows + where[r, 0][0], tile.rows - 1)
            rows.append(bias.row_of(visibility.bias, tile.batch, tile.head, row))
        list_ = self.list_of(tile)
        ends = (visibility.lists[(*list_, kind)] for kind in (FREE, BIASED, CAREFUL))
        return BiasBounds(list_, tuple(rows), where[0, 0][1], tile.keys, *ends)

    def spans(self, first, end, bounds: BiasBounds) -> list[Span]:
        free_end = cutlass.max(first, cutlass.min(bounds.free_end, end))
        biased_end = cutlass.max(free_end, cutlass.min(bounds.biased_end, end))
        careful_end = cutlass.max(biased_end, cutlass.min(bounds.careful_end, end))
        return [
            Span(first, free_end),
            Span(free_end, biased_end, Edge(biased=True)),
            Span(biased_end, careful_end, Edge(biased=True, careful=True)),
            Span(careful_end, end, Edge()),
        ]

    def sees_all(self, bounds: BiasBounds, position):
        return position < bounds.free_end

    @cute.jit
    def fetch(self, position, bounds: BiasBounds, visibility: Bias, edge: cutlass.Constexpr):
        """Reads the bias of a key block as `mask` takes it, two elements at a time. Beyond the last
        key it reads the last ones, so that nothing branches, which may stand beside products."""
        words = None
        if const_expr(edge is not None and edge.biased):
            count = self.tile_n // COLUMNS
            words = cute.make_rmem_tensor((count, 2), Int32)
            first = (
                bias.entry(visibility.lists, *bounds.list_, position) * self.tile_n + bounds.column
            )
            last = (bounds.keys - 1) // 2 * 2
            for r in cutlass.range_constexpr(2):
                row = bounds.rows[r]
                found = bias.pairs(visibility.bias, row + first, count, COLUMNS // 2)
                for i in cutlass.range_constexpr(count):
                    if const_expr(edge.careful):
                        offset = row + cutlass.min(first + COLUMNS * i, last)
                        words[i, r] = bias.pairs(visibility.bias, offset)[0]
                    else:
                        words[i, r] = found[i]
            self.prefetch(position + 1, bounds, visibility)
        return words

    @cute.jit
    def prefetch(self, position, bounds: BiasBounds, visibility: Bias):
        """Brings the bias of a key block to L2, or of the last one that has any. A thread brings a
        quarter of its two rows in every 64 keys."""
        position = cutlass.min(position, bounds.careful_end - 1)
        first = bias.entry(visibility.lists, *bounds.list_, position) * self.tile_n
        for i in cutlass.range_constexpr(0, self.tile_n, LINE):
            key = cutlass.min(first + i + bounds.column * (SECTOR // 2), bounds.keys - 1)
            for r in cutlass.range_constexpr(2):
                bias.prefetch(visibility.bias, bounds.rows[r] + key)

    @cute.jit
    def mask(
        self,
        scores,
        position,
        bounds: BiasBounds,
        edge: cutlass.Constexpr,
        visibility: Bias,
        fetched,
    ):
        """Adds its bias to the scores of a key block, and hides keys beyond the last one."""
        scores = layout_utils.reshape_acc_to_mn(scores)
        for r in cutlass.range_constexpr(2):
            if const_expr(edge.biased):
                elements = cute.recast_tensor(fetched[None, r], self.dtype)
                for c in cutlass.range_constexpr(cute.size(elements)):
                    scores[r, c] = bias.added(
                        scores[r, c], elements[c], visibility.inverse_scale, edge.careful
                    )
            if const_expr(edge.careful or not edge.biased):
                block = bias.entry(visibility.lists, *bounds.list_, position)
                self.hide(scores, r, bounds.keys - bounds.column - block * self.tile_n)
