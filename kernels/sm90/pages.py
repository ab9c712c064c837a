"""How TMA brings Hopper's key blocks from pages (kernels/common/pages.py).

TMA fills boxes behind a sequence's length with zeros, and so it does for pages that the cache does
not have. Rows behind the length within a box hold anything: the scores of such keys are masked, and
such values must be cleared in shared memory.
"""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from kernels.common.pages import LARGE, SMALL, Table, find, load_box
from kernels.sm90 import staging
from kernels.sm90.staging import Load


@dataclass(frozen=True)
class Boxes:
    """Keys or values on their way to shared memory in boxes."""

    load: Load  # of which these take the stages and the pipeline
    kinds: tuple  # a TMA atom, and the cache in TMA coordinates, for each kind of box

    @classmethod
    def of(cls, large: Load, small: tuple):
        """Both kinds. `large` has the atom of large boxes."""
        return cls(large, (small, (large.atom, large.source)))


class Pages:
    """Loads key blocks of `block_n` keys from pages. One warp does it."""

    def __init__(self, dtype, block_n: int, large: bool):
        """`large` says whether there are large boxes, too."""
        self.dtype, self.block_n = dtype, block_n
        # of each kind of box
        self.rows = (SMALL, math.gcd(block_n, LARGE)) if large else (SMALL,)

    def columns(self, head_dim: int) -> int:
        """The columns of a box: those of a swizzled row in shared memory."""
        return math.gcd(head_dim, 64)

    def tma(self, op, cache: cute.Tensor, head_dim: int) -> list[tuple]:
        """For each kind of box a TMA atom, and the cache [page_size, head_dim, heads, pages] in TMA
        coordinates."""
        columns, found = self.columns(head_dim), []
        for rows in self.rows:
            layout = staging.smem_layout(self.dtype, rows, columns, 1)
            atom, source = staging.tma(op, cache, layout, rows, columns)
            found.append((atom, source))
        return found

    @cute.jit
    def find(self, table: Table, sequence: Int32, keys: Int32, block: Int32) -> Int32:
        """The page of each box of a key block, one in each lane. The sequence has `keys`."""
        box = Int32(SMALL)
        if const_expr(len(self.rows) > 1) and table.in_large_boxes:
            box = Int32(self.rows[1])
        return find(table, sequence, keys, block * self.block_n, self.block_n, box)

    @cute.jit
    def load(
        self, boxes: Boxes, head_dim: cutlass.Constexpr, table: Table, head: Int32, block: Int32,
        pages: Int32, state,
    ):  # fmt: skip
        """Loads a key block of a head. `pages` are those that `find` found."""
        boxes.load.pipeline.producer_acquire(state)
        row = block * self.block_n % table.page_size
        if const_expr(len(self.rows) > 1) and table.in_large_boxes:
            self.load_boxes(boxes, 1, head_dim, table, head, row, pages, state)
        else:
            self.load_boxes(boxes, 0, head_dim, table, head, row, pages, state)
        boxes.load.pipeline.producer_commit(state)

    @cute.jit
    def load_boxes(
        self, boxes: Boxes, kind: cutlass.Constexpr, head_dim: cutlass.Constexpr, table: Table,
        head: Int32, row: Int32, pages: Int32, state,
    ):  # fmt: skip
        """Loads all boxes of a key block, whose first key is the page's `row`."""
        load, (atom, cache) = boxes.load, boxes.kinds[kind]
        rows, columns = self.rows[kind], self.columns(head_dim)
        stage = load.stages[None, None, state.index]
        barrier = load.pipeline.producer_get_barrier(state)
        for i in cutlass.range(self.block_n // rows, unroll=1):
            page = cute.arch.shuffle_sync(pages, i)
            source = cute.domain_offset((row, 0), cache[None, None, head, page])
            load_box(atom, source, stage, i, (rows, columns), barrier)
            row += rows
            if row >= table.page_size:
                row = Int32(0)
