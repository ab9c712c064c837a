"""Before a kernel with a bias: reads the bias once, and lists for each query tile the key blocks
that it leaves to compute. kernels/sm90/bias.py says what a list is.

A bias of minus infinity hides a key from a query, and so does one of HIDDEN or less: beside any
other key, such a key has a weight of zero. A query from which every key is hidden, but some by a
finite bias, attends to these; so the tiles that have such keys are listed for its tile, too.

A CTA has a query tile, and each of its warps goes over cells of 64 queries and 64 keys of it. A
lane reads two keys of each query. Most cells of most masks have the same bias everywhere, and are
judged by one element, or have nothing that is large or hidden. The queries of the others are looked
at one by one. The kinds of the cells go to memory, where kernels/sm90/map_keys.py finds
them.
"""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.utils import SmemAllocator

from kernels.common import symbolic
from kernels.kernel import Kernel
from kernels.sm90 import bias as biases
from kernels.sm90 import lists as tile_lists
from kernels.sm90.bias import CELL
from kernels.sm90.lists import BIASED_TILE, CAREFUL_TILE, CUT_TILE, FREE_TILE, HIDDEN_TILE
from kernels.sm90.warpgroups import WARP

WARPS = 16
PART = 16  # queries of a cell that are gone through at a time: 32 would spill
# The bits of the hidden elements, from HIDDEN to minus infinity. HIDDEN is -65504, or as near to it
# as bf16 comes: PyTorch fills bool masks with it where it does not use minus infinity.
HIDDEN = {"bf16": 0xC780, "fp16": 0xFBFF}
MINUS_INFINITY = {"bf16": 0xFF80, "fp16": 0xFC00}
ELEMENT = 0xFFFF  # the first of a word's two
MAGNITUDES = 0x7FFF7FFF  # of both
LARGE = 0x80008000 - (1 << 32)  # the highest bits of both
# From here on, -2^20 and 2^20, a score beside the bias is rounded by more than scores differ, and
# it matters how. fp16 has no such elements.
LOW = {"bf16": 0xC980, "fp16": 0xFC00}
HIGH = {"bf16": (0x4980, 0x7F80), "fp16": (0x7C00, 0x7C00)}  # from, and to infinity
# What is known of a cell before it has a kind, in bits: whether a key is seen, whether the bias is
# zero everywhere, whether a key's bias is not minus infinity, whether one is LOW, whether one is
# HIGH.
SEEN, ZERO, FINITE, HAS_LOW, HAS_HIGH = (1 << bit for bit in range(5))
WORDS = 4  # int32 of what a warp finds of its queries: seen, then finite


class Strip(NamedTuple):
    """64 queries."""

    batch: Int32
    head: Int32
    index: Int32
    rows: Int32  # how many of the queries there are, maybe none
    keys: Int32


class Queries(NamedTuple):
    """A bit for each query of a strip."""

    low: Int32
    high: Int32

    @classmethod
    def none(cls) -> "Queries":
        return cls(Int32(0), Int32(0))

    def __or__(self, other: "Queries") -> "Queries":
        return Queries(self.low | other.low, self.high | other.high)

    def __and__(self, other: "Queries") -> "Queries":
        return Queries(self.low & other.low, self.high & other.high)

    def followed_by(self, bits: Int32) -> "Queries":
        """Drops the first PART queries, and puts others behind the last."""
        rest = (1 << 32 - PART) - 1
        low = (self.low >> PART) & rest | self.high << 32 - PART
        return Queries(low, (self.high >> PART) & rest | bits << 32 - PART)

    def any(self):
        return (self.low | self.high) != 0


class Cell(NamedTuple):
    seen: Queries  # that see a key of the cell
    finite: Queries  # of which a key's bias is not minus infinity
    zero: Int32  # whether the bias is zero everywhere
    far: Int32  # HAS_LOW and HAS_HIGH


class Part(NamedTuple):
    """The same of a few queries, whose bits are the lowest ones."""

    seen: Int32
    finite: Int32
    far: Int32


@cute.jit
def first_bits(count: Int32) -> Int32:
    return Int32(-1) if count >= 32 else (Int32(1) << cutlass.max(count, 0)) - 1


def first_queries(count: Int32) -> Queries:
    return Queries(first_bits(count), first_bits(count - 32))


class MapQueries(tile_lists.Lister):
    def __init__(self, kernel: Kernel):
        self.hidden, self.infinite = HIDDEN[kernel.dtype], MINUS_INFINITY[kernel.dtype]
        self.low, self.high = LOW[kernel.dtype], HIGH[kernel.dtype]
        # Added to the magnitudes of a word's elements, this sets the highest bit of those that are
        # as large as HIDDEN. Others are neither hidden nor LOW or HIGH.
        distance = 0x8000 - (self.hidden & 0x7FFF)
        self.to_large = distance << 16 | distance
        if kernel.block_m % CELL or kernel.block_n % CELL:
            raise ValueError(f"block_m and block_n of {kernel.name} must be multiples of {CELL}")
        self.tile_n = kernel.block_n
        self.strips, self.width = kernel.block_m // CELL, kernel.block_n // CELL

    @cute.jit
    def __call__(
        self, bias: cute.Tensor, cells: cute.Tensor, lists: cute.Tensor, stream: cuda.CUstream
    ):
        batch, heads, tiles, _ = lists.shape
        self.kernel(bias, cells, lists).launch(
            grid=[tiles * heads * batch, 1, 1], block=[WARPS * WARP, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, bias: cute.Tensor, cells: cute.Tensor, lists: cute.Tensor):
        @cute.struct
        class Storage:
            found: cute.struct.MemRange[Int32, WARPS * WORDS]

        found = SmemAllocator().allocate(Storage).found.get_tensor(cute.make_layout((WORDS, WARPS)))
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        cta, _, _ = cute.arch.block_idx()
        _, heads, tiles, _ = lists.shape
        tile, head, batch = cta % tiles, cta // tiles % heads, cta // tiles // heads
        _, _, rows, keys = bias.shape
        index = tile * self.strips + warp % self.strips
        strip = Strip(batch, head, index, cutlass.min(rows - index * CELL, CELL), keys)
        self.read(bias, cells, strip, warp, found)
        cute.arch.sync_threads()
        self.classify(cells, strip, warp, found)
        cute.arch.sync_threads()
        if warp == 0:
            blocks = cute.ceil_div(keys, self.tile_n)
            self.write(cells, lists, tile_lists.List(batch, head, tile, blocks, keys))

    # The cells

    @cute.jit
    def read(self, bias, cells, strip: Strip, warp, found: cute.Tensor):
        """Finds out about the cells of a warp, and about its queries in all of these."""
        lane = cute.arch.lane_idx()
        seen, finite = Queries.none(), Queries.none()
        there = first_queries(strip.rows)
        if strip.rows > 0:
            columns = cute.ceil_div(strip.keys, CELL)
            for column in cutlass.range(
                warp // self.strips, columns, WARPS // self.strips, unroll=1
            ):
                cell = self.cell(bias, strip, column, there)
                seen, finite = seen | cell.seen, finite | cell.finite
                known = cell.far
                known = known | (SEEN if cell.seen.any() else 0)
                known = known | (ZERO if cell.zero != 0 else 0)
                known = known | (FINITE if cell.finite.any() else 0)
                if lane == 0:
                    cells[strip.batch, strip.head, strip.index, column] = known
        if lane == 0:
            words = (*seen, *finite)
            for i in cutlass.range_constexpr(WORDS):
                found[i, warp] = words[i]

    @cute.jit
    def words(self, bias, strip: Strip, column, first: Int32, count: cutlass.Constexpr):
        """A lane's words of some queries of a cell, and which of their bits are elements. In place
        of queries and keys that are none it reads the last ones."""
        lane = cute.arch.lane_idx()
        words = cute.make_rmem_tensor(count, Int32)
        key, last = column * CELL + 2 * lane, (strip.keys - 1) // 2 * 2
        row = strip.index * CELL + cutlass.min(first, strip.rows - 1)
        offset = biases.row_of(bias, strip.batch, strip.head, row) + cutlass.min(key, last)
        stride = Int64(bias.stride[2])
        for r in cutlass.range_constexpr(count):
            words[r] = biases.pairs(bias, offset)[0]
            offset += stride if first + r + 1 < strip.rows else Int64(0)
        elements = Int32(-1)
        if key + 1 >= strip.keys:
            elements = Int32(ELEMENT)
        if key >= strip.keys:
            elements = Int32(0)
        return words, elements

    def both(self, word: Int32):
        return word & ELEMENT, (word >> 16) & ELEMENT

    @cute.jit
    def cell(self, bias, strip: Strip, column, there: Queries) -> Cell:
        words, elements = self.words(bias, strip, column, Int32(0), CELL)
        # Keys that are none are at minus infinity, and count for nothing in `zero`.
        put = self.infinities(elements)
        differing, magnitudes, start = Int32(0), Int32(0), words[0] & elements | put
        large = Int32(0)
        for r in cutlass.range_constexpr(CELL):
            magnitude = words[r] & elements & MAGNITUDES
            magnitudes = magnitudes | magnitude
            large = large | (magnitude + self.to_large)
            differing = differing | ((words[r] & elements | put) ^ start)
        zero = cute.arch.vote_all_sync(magnitudes == 0)
        everywhere = cute.arch.shuffle_sync(start, 0)
        one, other = self.both(everywhere)
        seen, finite, far = Queries(Int32(-1), Int32(-1)), Queries(Int32(-1), Int32(-1)), Int32(0)
        alike = cute.arch.vote_all_sync(differing == 0 and start == everywhere and one == other)
        # Where nothing is large, every query sees a key.
        if not cute.arch.vote_all_sync(large & LARGE == 0):
            if alike:
                seen = self.none_if(self.hides(one), seen)
                finite = self.none_if(one == self.infinite, finite)
                far = self.far(one)
            else:
                for first in cutlass.range(0, CELL, PART, unroll=1):
                    part = self.part(bias, strip, column, first)
                    seen, finite = seen.followed_by(part.seen), finite.followed_by(part.finite)
                    far = far | part.far
        return Cell(seen & there, finite & there, 1 if zero else 0, far)

    @cute.jit
    def none_if(self, condition, queries: Queries) -> Queries:
        return Queries.none() if condition else queries

    def infinities(self, elements: Int32) -> Int32:
        """Minus infinity where a lane's word has no elements."""
        return ~elements & Int32(self.infinite << 16 | self.infinite)

    @cute.jit
    def part(self, bias, strip: Strip, column, first: Int32) -> Part:
        """Goes through some queries one by one."""
        words, elements = self.words(bias, strip, column, first, PART)
        seen, finite, far = (Int32(0) for _ in range(3))
        for r in cutlass.range_constexpr(PART):
            one, other = self.both(words[r] & elements | self.infinities(elements))
            bit = Int32(1) << r
            seen |= 0 if self.hides(one) and self.hides(other) else bit
            finite |= 0 if one == self.infinite and other == self.infinite else bit
            far |= self.far(one) | self.far(other)
        return Part(*(cute.arch.warp_redux_sync(bits, "or") for bits in (seen, finite, far)))

    @cute.jit
    def far(self, element: Int32) -> Int32:
        """HAS_LOW or HAS_HIGH, if an element is."""
        low = HAS_LOW if element >= self.low and element < self.infinite else 0
        first, infinity = self.high
        return low | (HAS_HIGH if element >= first and element < infinity else 0)

    @cute.jit
    def hides(self, element: Int32):
        return element >= self.hidden and element <= self.infinite

    @cute.jit
    def classify(self, cells, strip: Strip, warp, found: cute.Tensor):
        """Replaces what is known of a warp's cells by their kinds, those of lists.py."""
        seen, finite = Queries.none(), Queries.none()
        for i in cutlass.range_constexpr(WARPS // self.strips):
            other = warp % self.strips + i * self.strips
            seen = seen | Queries(found[0, other], found[1, other])
            finite = finite | Queries(found[2, other], found[3, other])
        unseeing = Queries(finite.low & ~seen.low, finite.high & ~seen.high).any()
        if strip.rows > 0:
            columns = cute.ceil_div(strip.keys, CELL)
            first = warp // self.strips * WARP + cute.arch.lane_idx()
            for column in cutlass.range(first, columns, WARPS // self.strips * WARP, unroll=1):
                known = cells[strip.batch, strip.head, strip.index, column]
                listed = known & SEEN != 0 or (unseeing and known & FINITE != 0)
                far = known & HAS_HIGH != 0 or (unseeing and known & HAS_LOW != 0)
                kind = CAREFUL_TILE if far else BIASED_TILE
                kind = kind if listed else HIDDEN_TILE
                cells[strip.batch, strip.head, strip.index, column] = (
                    FREE_TILE if known & ZERO != 0 else kind
                )

    # The list

    @cute.jit
    def kind(self, cells: cute.Tensor, of: tile_lists.List, block: Int32) -> Int32:
        """The kind of a key block, whose cells may differ."""
        ends = (block + 1) * self.tile_n > of.keys
        some, all_free, careful = False, True, ends
        for strip in cutlass.range_constexpr(self.strips):
            for column in cutlass.range_constexpr(self.width):
                row = of.index * self.strips + strip
                at = block * self.width + column
                if row < cells.shape[2] and at < cells.shape[3]:
                    cell = cells[of.batch, of.head, row, at]
                    some = some or cell != HIDDEN_TILE
                    all_free = all_free and cell == FREE_TILE
                    careful = careful or cell == CAREFUL_TILE
        free, biased = (CUT_TILE if ends else FREE_TILE), (CAREFUL_TILE if careful else BIASED_TILE)
        return (free if all_free else biased) if some else HIDDEN_TILE


def entry(kernel: Kernel):
    return MapQueries(kernel), symbolic.arguments(kernel)
