"""Keys and values in pages: where a sequence's key blocks are, and how TMA brings them.

A page holds page_size keys of a sequence, any multiple of 16, and a row of the block table names a
sequence's pages in order. A box is what TMA copies at a time: rows of one page. A key block
consists of boxes of 64 rows where these divide a page, else of 16. Which of the two is a run-time
value, so that one object serves every page size.

Entries of the block table are read only for pages that the sequence's length reaches. TMA fills
boxes behind it with zeros, and so it does for pages that the cache does not have. Rows behind the
length within a box hold anything: the scores of such keys are masked, and such values must be
cleared in shared memory.
"""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from quack import copy_utils
from quack.cute_dsl_utils import ParamsBase

from kernels.common import packed
from kernels.sm90 import staging
from kernels.sm90.staging import Load

# The rows of the small boxes, of which every page must hold whole ones. Fewer would take more boxes
# than one warp has time to issue; eight rows are as many as a swizzle needs.
SMALL = 16
LARGE = 64
NOWHERE = -1  # a page that no cache has


@dataclass
class Table(ParamsBase):
    """Each sequence's pages, and how many keys it has."""

    pages: cute.Tensor  # int32 [batch, columns]
    # int32 [batch + 1] and [batch]. What is not given has no elements.
    cu_seqlens_k: cute.Tensor
    seqused_k: cute.Tensor
    page_size: Int32

    @property
    def in_large_boxes(self) -> Boolean:
        """Whether whole large boxes make up a page."""
        return self.page_size % LARGE == 0


@cute.jit
def keys_in_use(table: Table, index: Int32) -> Int32:
    """The number of a sequence's keys: no more than its row of the table holds. cu_seqlens_k gives
    the number of keys, not their position."""
    keys = cute.size(table.pages, mode=[1]) * table.page_size
    if cute.size(table.cu_seqlens_k) > 0:
        keys = packed.clamp(table.cu_seqlens_k[index + 1] - table.cu_seqlens_k[index], keys)
    if cute.size(table.seqused_k) > 0:
        keys = packed.clamp(table.seqused_k[index], keys)
    return keys


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
        lane = cute.arch.lane_idx()
        key = block * self.block_n + lane * box
        page = Int32(NOWHERE)
        if lane * box < self.block_n and key < keys:
            page = table.pages[sequence, key // table.page_size]
        return page

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
            for c in cutlass.range_constexpr(head_dim // columns):
                copy, _, _ = copy_utils.tma_get_copy_fn(
                    atom,
                    0,
                    cute.make_layout(1),
                    cute.local_tile(source, (rows, columns), (0, c)),
                    cute.local_tile(stage, (rows, columns), (i, c)),
                    single_stage=True,
                )
                copy(tma_bar_ptr=barrier)
            row += rows
            if row >= table.page_size:
                row = Int32(0)
