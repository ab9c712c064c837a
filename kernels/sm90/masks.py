"""Finds which keys a warpgroup's rows see, and sets the scores of the others to minus infinity."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from quack import layout_utils

from kernels.kernel import Kernel, Mask
from kernels.sm90.schedule import Tile
from kernels.sm90.window import Window

WORD = 16  # columns that a word of bits stands for; lowest_bits() shifts by up to as many


class KeyBounds(NamedTuple):
    """Which keys the rows of a thread's scores see."""

    # Each row sees the keys [first, end). Both are relative to the column of the thread's first
    # score.
    first: tuple[Int32, Int32]
    end: tuple[Int32, Int32]
    all_first: Int32  # [all_first, all_end): the keys that every row of the warpgroup sees
    all_end: Int32
    any_end: Int32  # the end of the keys that any row of the warpgroup sees


class Span(NamedTuple):
    """Key blocks that are alike: [begin, end)."""

    begin: Int32
    end: Int32
    edge: bool = True  # keys of it are masked
    left: bool = False  # at a window's left edge too


class Masks:
    def __init__(self, kernel: Kernel, rows: int):
        """`rows` are the query rows of a warpgroup."""
        self.rows, self.tile_n = rows, kernel.block_n
        self.window = kernel.mask is Mask.WINDOW
        self.bounded = kernel.mask is not Mask.FULL  # by the row, not by the keys alone

    @cute.jit
    def key_bounds(self, tile: Tile, window: Window, group, thread, mma_qk) -> KeyBounds:
        where = mma_qk.get_slice(thread).partition_C(
            cute.make_identity_tensor((self.rows, self.tile_n))
        )
        where = layout_utils.reshape_acc_to_mn(where)
        diagonal = tile.row + group * self.rows + tile.keys - tile.rows
        first, end = [], []
        for r in cutlass.range_constexpr(2):
            row, column = diagonal + where[r, 0][0], where[0, 0][1]
            first.append(row - window.left - column)
            end.append(
                (cutlass.min(row + window.right + 1, tile.keys) if self.bounded else tile.keys)
                - column
            )
        all_first = (
            cutlass.max(diagonal + self.rows - 1 - window.left, 0) if self.window else Int32(0)
        )
        all_end = (
            cutlass.max(cutlass.min(diagonal + window.right + 1, tile.keys), 0)
            if self.bounded
            else tile.keys
        )
        any_end = (
            cutlass.max(cutlass.min(diagonal + self.rows + window.right, tile.keys), 0)
            if self.bounded
            else tile.keys
        )
        any_end = any_end if tile.row + group * self.rows < tile.rows else 0
        return KeyBounds(tuple(first), tuple(end), all_first, all_end, any_end)

    def spans(self, first, end, bounds: KeyBounds) -> list[Span]:
        """The key blocks [first, end): those of a window's left edge, those that all rows see,
        those of the right edge. A branch between the issue of a product and the wait for it would
        make the compiler wait at the branch, so each has its own loop."""
        left_end = first
        if self.window:
            left_end = cutlass.max(
                first, cutlass.min(cute.ceil_div(bounds.all_first, self.tile_n), end)
            )
        free_end = cutlass.max(left_end, cutlass.min(bounds.all_end // self.tile_n, end))
        spans = [Span(first, left_end, left=True)] if self.window else []
        return [*spans, Span(left_end, free_end, edge=False), Span(free_end, end)]

    @cute.jit
    def sees_all(self, bounds: KeyBounds, block):
        """Whether all rows see all keys of a key block."""
        return (
            block * self.tile_n >= bounds.all_first and (block + 1) * self.tile_n <= bounds.all_end
        )

    @cute.jit
    def mask(self, scores, block, bounds: KeyBounds, left: cutlass.Constexpr):
        """Hides the scores of a key block that their rows do not see. `left` says whether keys may
        lie before a row's first.

        Each bit of a word says whether a column is seen; this takes half as many instructions as
        one comparison per score.
        """
        scores = layout_utils.reshape_acc_to_mn(scores)
        for r in cutlass.range_constexpr(2):
            seen = self.columns_before(bounds.end[r] - block * self.tile_n)
            hidden = self.columns_before(bounds.first[r] - block * self.tile_n) if left else 0
            for c in cutlass.range_constexpr(0, cute.size(scores, mode=[1]), WORD):
                bits = self.lowest_bits(seen - c)
                if const_expr(left):
                    bits = bits & ~self.lowest_bits(hidden - c)
                for i in cutlass.range_constexpr(min(WORD, cute.size(scores, mode=[1]) - c)):
                    scores[r, c + i] = scores[r, c + i] if bits & (1 << i) else -Float32.inf

    def columns_before(self, key):
        """How many of a thread's columns, which are two of every eight, are less than a key."""
        key = cutlass.max(key, 0)
        return (key // 8) * 2 + cutlass.min(key % 8, 2)

    def lowest_bits(self, count):
        return (Int32(1) << cutlass.min(cutlass.max(count, 0), WORD)) - 1
