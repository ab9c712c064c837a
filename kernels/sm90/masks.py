"""Finds which keys a warpgroup's rows see, loads key blocks by their position, and sets the scores
of keys that are not seen to minus infinity."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from quack import layout_utils

from kernels.kernel import Kernel, Mask
from kernels.sm90 import staging
from kernels.sm90.schedule import Tile
from kernels.sm90.staging import Load
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


class Edge(NamedTuple):
    """What hides keys of a key block from some of its rows: by default that the rows end."""

    left: bool = False  # the rows begin, too, as at a window's left edge
    # With a bias (kernels/sm90/bias_masks.py): it alone, or where it must be added with care that
    # the rows end, too.
    biased: bool = False
    careful: bool = False


class Span(NamedTuple):
    """Key blocks that are alike: [begin, end). Where all rows see all keys, there is no edge."""

    begin: Int32
    end: Int32
    edge: Edge | None = None


class Masks:
    def __init__(self, kernel: Kernel, rows: int):
        """`rows` are the query rows of a warpgroup."""
        self.rows, self.tile_n = rows, kernel.block_n
        self.varlen = kernel.packed
        self.window = kernel.mask is Mask.WINDOW
        self.first_edge = Edge(left=self.window)  # that a row's first key block may have
        self.bounded = kernel.mask is not Mask.FULL  # by the row, not by the keys alone

    def block_at(self, tile: Tile, position, window: Window) -> Int32:
        """The key block at a position. Only with a bias these are not the same."""
        return position

    def load_block(self, load: Load, tile: Tile, position, visibility, state):
        """Loads the key block at a position, or its values."""
        block = self.block_at(tile, position, visibility)
        source = staging.rows_of(
            load.source, tile.head_kv, tile.batch, tile.keys, tile.end_k, self.varlen
        )
        staging.load_rows(load, source, block * self.tile_n, state)

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
        spans = [Span(first, left_end, Edge(left=True))] if self.window else []
        return [*spans, Span(left_end, free_end), Span(free_end, end, Edge())]

    @cute.jit
    def sees_all(self, bounds: KeyBounds, block):
        """Whether all rows see all keys of a key block."""
        return (
            block * self.tile_n >= bounds.all_first and (block + 1) * self.tile_n <= bounds.all_end
        )

    def fetch(self, position, bounds, window: Window, edge: Edge | None) -> None:
        """Reads what `mask` needs of memory: nothing. It may stand between the issue of a product
        and the wait for it."""

    @cute.jit
    def mask(
        self, scores, block, bounds: KeyBounds, edge: cutlass.Constexpr, window: Window, fetched
    ):
        """Hides the scores of a key block that their rows do not see."""
        scores = layout_utils.reshape_acc_to_mn(scores)
        for r in cutlass.range_constexpr(2):
            first = bounds.first[r] - block * self.tile_n if edge.left else None
            self.hide(scores, r, bounds.end[r] - block * self.tile_n, first)

    @cute.jit
    def hide(self, scores, r: cutlass.Constexpr, end: Int32, first: Int32 | None = None):
        """Hides the scores of a row from the key `end` on, and those before the key `first`, if
        given. Both count from the column of the thread's first score.

        Each bit of a word says whether a column is seen; this takes half as many instructions as
        one comparison per score.
        """
        seen = self.columns_before(end)
        hidden = 0 if first is None else self.columns_before(first)
        for c in cutlass.range_constexpr(0, cute.size(scores, mode=[1]), WORD):
            bits = self.lowest_bits(seen - c)
            if const_expr(first is not None):
                bits = bits & ~self.lowest_bits(hidden - c)
            for i in cutlass.range_constexpr(min(WORD, cute.size(scores, mode=[1]) - c)):
                scores[r, c + i] = scores[r, c + i] if bits & (1 << i) else -Float32.inf

    def columns_before(self, key):
        """How many of a thread's columns, which are two of every eight, are less than a key."""
        key = cutlass.max(key, 0)
        return (key // 8) * 2 + cutlass.min(key % 8, 2)

    def lowest_bits(self, count):
        return (Int32(1) << cutlass.min(cutlass.max(count, 0), WORD)) - 1
