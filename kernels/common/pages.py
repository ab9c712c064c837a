"""Keys and values in pages: which page holds a key, and how many keys a sequence has.

A page holds page_size keys of a sequence, any multiple of 16, and a row of the block table names a
sequence's pages in order. A box is what TMA copies at a time: rows of one page. A key block
consists of boxes of 64 rows where these divide a page, else of 16. Which of the two is a run-time
value, so that one object serves every page size.

Entries of the block table are read only for pages that the sequence's length reaches.
"""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Boolean, Int32
from quack import copy_utils
from quack.cute_dsl_utils import ParamsBase

from kernels.common import packed

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


@cute.jit
def find(table: Table, sequence: Int32, keys: Int32, first: Int32, count: Int32, box: Int32):
    """The page of each box of a key block, one in each lane: of `count` keys from `first` on, in
    boxes of `box` rows. The sequence has `keys`; a box behind them is nowhere."""
    lane = cute.arch.lane_idx()
    key = first + lane * box
    page = Int32(NOWHERE)
    if lane * box < count and key < keys:
        page = table.pages[sequence, key // table.page_size]
    return page


def load_box(atom: cute.CopyAtom, source: cute.Tensor, stage: cute.Tensor, i: Int32, box, barrier):
    """Loads the first rows of `source` into a stage [rows, head_dim], where they are its i-th box.
    TMA takes as many rows and columns at a time as `box` says."""
    for c in range(cute.size(stage, mode=[1]) // box[1]):
        copy, _, _ = copy_utils.tma_get_copy_fn(
            atom,
            0,
            cute.make_layout(1),
            cute.local_tile(source, box, (0, c)),
            cute.local_tile(stage, box, (i, c)),
            single_stage=True,
        )
        copy(tma_bar_ptr=barrier)
