"""How TMA brings Blackwell's key blocks from pages (kernels/common/pages.py).

The tensor cores read values where TMA put them, and nobody can clear rows there that are no values
of the sequence. So TMA must fill them with zeros. To it a cache is rows of one tensor, a page lies
whole rows behind the one before, and a page's rows in use are the last ones before a bound, as a
packed sequence's are (kernels/common/packed.py).
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync
from cutlass.utils import LayoutEnum
from quack import layout_utils, sm90_utils
from quack.cute_dsl_utils import ParamsBase

from kernels.common import packed
from kernels.common.pages import LARGE, SMALL, Table, find, keys_in_use, load_box
from kernels.sm100.sequences import IndexedRows

COLUMNS = 64  # of a box: a swizzled row in shared memory


def layout_of(dtype, rows: int, columns: int) -> cute.ComposedLayout:
    """Rows of keys, or of values, in shared memory: the tensor cores read both like this."""
    return sm90_utils.make_smem_layout(dtype, LayoutEnum.ROW_MAJOR, (rows, columns))


@dataclass
class Cache(ParamsBase):
    """Keys, or values, for boxes of both kinds."""

    small_atom: cute.CopyAtom
    small: cute.Tensor  # [row, head_dim, heads, end], as TMA takes coordinates
    large_atom: cute.CopyAtom
    large: cute.Tensor
    page_rows: Int32  # from the beginning of a page to that of the next
    pages: Int32

    @staticmethod
    def of(tensor: cute.Tensor) -> "Cache":
        """Makes the boxes of keys or values [pages, page_size, heads, head_dim]."""
        rows = layout_utils.select(packed.sequences(as_rows(tensor)), [1, 3, 2, 0])
        found = []
        for count in (SMALL, LARGE):
            layout = layout_of(tensor.element_type, count, COLUMNS)
            found += cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileG2SOp(), rows, layout, (count, COLUMNS)
            )
        page_rows = Int32(tensor.stride[0] // tensor.stride[1])
        return Cache(*found, page_rows, Int32(tensor.shape[0]))


def as_rows(cache: cute.Tensor) -> cute.Tensor:
    """The cache as [rows, heads, head_dim], with the rows of its first page for their number."""
    return cache[0, None, None, None]


@dataclass
class PagedKeys(ParamsBase):
    """All that the kernel knows of its keys and values. It takes the place of upstream's
    seqused_k."""

    table: Table
    k: Cache
    v: Cache

    def place(self, index: Int32) -> tuple[int, Int32]:
        """Where a sequence's keys begin, which is nowhere in particular, and how many of them are
        in use."""
        return 0, keys_in_use(self.table, index)


cute.Tensor.register(PagedKeys)  # upstream's kernels take tensors alone


@dataclass(frozen=True)
class Source:
    """The keys, or the values, of a sequence's head."""

    cache: Cache
    table: Table
    sequence: Int32
    head: Int32
    keys: Int32  # of the sequence

    @cute.jit
    def load(self, block: Int32, stage: cute.Tensor, barrier):
        """Loads a key block into a stage of [rows, head_dim]."""
        if self.table.in_large_boxes:
            self.load_boxes(self.cache.large_atom, self.cache.large, LARGE, block, stage, barrier)
        else:
            self.load_boxes(self.cache.small_atom, self.cache.small, SMALL, block, stage, barrier)

    @cute.jit
    def load_boxes(
        self, atom: cute.CopyAtom, cache: cute.Tensor, box: cutlass.Constexpr, block: Int32,
        stage: cute.Tensor, barrier,
    ):  # fmt: skip
        """The same, in boxes of `box` rows."""
        rows, table = cute.size(stage, mode=[0]), self.table
        pages = find(table, self.sequence, self.keys, block * rows, rows, box)
        for i in cutlass.range(rows // box, unroll=1):
            page = cute.arch.shuffle_sync(pages, i)
            key = block * rows + i * box
            row = key % table.page_size
            used, end = Int32(0), Int32(0)
            if page >= 0 and page < self.cache.pages:
                used = packed.clamp(self.keys - (key - row), table.page_size)
                end = page * self.cache.page_rows + used
            of_page = packed.rows_of(cache, 0, end, used)[None, None, self.head]
            of_page = cute.domain_offset((row, 0), of_page)
            load_box(atom, of_page, stage, i, (box, COLUMNS), barrier)


class PagedRows(IndexedRows):
    """Knows what upstream's code is about to load: it indexes these first. The rows that it gets
    are not looked at."""

    def __init__(self, tensor: cute.Tensor, row_mode: int, cache: Cache, table: Table):
        super().__init__(tensor, row_mode, of_keys=True)
        self.cache, self.table = cache, table

    def __getitem__(self, index):
        *_, head, sequence = index
        self.source = Source(self.cache, self.table, sequence, head, self.info.seqlen_k)
        return super().__getitem__(index)
