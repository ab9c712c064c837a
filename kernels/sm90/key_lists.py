"""Which query tiles a key block visits in the second pass of a backward with a bias, and the bias
of their scores. The query tiles of each head come from the key block's list for that head
(kernels/sm90/bias.py).

The scores are transposed, K Q^T, and a thread's rows are keys, while the keys of a query lie next
to each other in memory. So two warps that compute nothing bring the bias of a query tile to shared
memory as it lies, ahead of the products, and the warpgroup that adds it takes it from there with
ldmatrix, which transposes. A tile whose bias is zero is not read, and takes no stage.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warp
from flash_attn.cute.pipeline import PipelineAsync, PipelineStateSimple

from kernels.common import symbolic
from kernels.kernel import Kernel
from kernels.sm90 import bias as biases
from kernels.sm90 import staging
from kernels.sm90.bias import ALL, BIASED, FREE, Bias
from kernels.sm90.key_masks import KeyMasks
from kernels.sm90.key_tiles import KeyTile
from kernels.sm90.masks import Edge
from kernels.sm90.warpgroups import ROWS, WARP, WARPS

PARTS = 2  # warps that bring the bias, each half of the queries of a tile
ELEMENT = 2  # bytes
ROW_BYTES = ROWS * ELEMENT  # of a query in shared memory
# Chunks of a query's keys, which are the rows of the matrices that ldmatrix reads. Those of eight
# queries that follow each other are exchanged, so that a matrix lies in all banks.
CHUNK, MATRIX = 16, 8  # bytes; rows
# Bytes that a lane copies at a time: a chunk where every row of the bias begins at one, else two
# elements, which every bias allows that comes to the kernels.
WIDE, NARROW = CHUNK, 2 * ELEMENT
MATRICES = 4  # that ldmatrix reads at a time: of 16 keys and 16 queries
LOADS = ROWS // (2 * MATRIX)


class ListStep(NamedTuple):
    """The query tile at hand, and where the kinds of its head's list end."""

    head: Int32  # of the group
    position: Int32
    taken: Int32  # stages that earlier tiles took
    free_end: Int32
    biased_end: Int32
    end: Int32


@dataclass(frozen=True)
class Ring:
    """The bias of query tiles on its way through shared memory."""

    stages: cute.Tensor  # [keys, queries, stages], but for the exchange of chunks
    pipeline: PipelineAsync


@dataclass(frozen=True)
class Matrices:
    """What a thread reads of a stage."""

    ring: Ring
    first: Int32  # the element where its row of the first matrices begins


class KeyLists(KeyMasks):
    def __init__(self, kernel: Kernel):
        super().__init__(kernel)
        self.dtype, self.stages = symbolic.DTYPES[kernel.dtype], kernel.stages
        self.edges = (None, Edge(biased=True), Edge(biased=True, careful=True))
        self.uneven = True  # as those of a causal mask, which a bias may be

    @cute.jit
    def query_tiles(self, row: Int32, rows: Int32, keys: Int32, bias: Bias):
        end = cute.ceil_div(rows, ROWS)
        return Int32(0), end, Int32(0), end

    # The query tiles one after the other

    @cute.jit
    def at_head(self, tile: KeyTile, head: Int32, taken: Int32, bias: Bias) -> ListStep:
        """The first query tile of a head. Behind the last head it is the last one's."""
        list_ = self.list_of(tile, cutlass.min(head, tile.heads - 1))
        ends = (bias.lists[(*list_, kind)] for kind in (FREE, BIASED, ALL))
        return ListStep(head, Int32(0), taken, *ends)

    def list_of(self, tile: KeyTile, head: Int32):
        return tile.batch, tile.query_head(head), tile.row // ROWS

    def first(self, tile: KeyTile, bias: Bias) -> ListStep:
        return self.at_head(tile, Int32(0), Int32(0), bias)

    @cute.jit
    def steps(self, tile: KeyTile, bias: Bias) -> Int32:
        steps = Int32(0)
        for head in range(tile.heads):
            steps += bias.lists[(*self.list_of(tile, head), ALL)]
        return steps

    @cute.jit
    def following(self, tile: KeyTile, step: ListStep, bias: Bias) -> ListStep:
        taken = step.taken + (0 if step.position < step.free_end else 1)
        position, head = step.position + 1, step.head
        free_end, biased_end, end = step.free_end, step.biased_end, step.end
        if position == end:
            upcoming = self.at_head(tile, head + 1, taken, bias)
            head, position = upcoming.head, upcoming.position
            free_end, biased_end, end = upcoming.free_end, upcoming.biased_end, upcoming.end
        return ListStep(head, position, taken, free_end, biased_end, end)

    def number(self, tile: KeyTile, step: ListStep, bias: Bias) -> Int32:
        return biases.entry(bias.lists, *self.list_of(tile, step.head), step.position)

    @cute.jit
    def has(self, edge: cutlass.Constexpr, tile: KeyTile, step: ListStep):
        return step.position < (step.free_end if edge is None else step.biased_end)

    # The scores

    @cute.jit
    def bounds(self, tile: KeyTile, bias: Bias, thread, mma_scores, ring: Ring) -> Matrices:
        """Lane 8 i + r has row r of matrix i. A warp has 16 keys, and so two chunks of a query; the
        matrices are of the first and the second one of eight queries, and of the next eight."""
        lane, matrix = thread % WARP, thread % WARP // MATRIX
        query = matrix // 2 * MATRIX + lane % MATRIX
        chunk = thread // WARP * 2 + matrix % 2
        return Matrices(ring, self.element(query, chunk))

    def element(self, query: Int32, chunk: Int32) -> Int32:
        """Where a chunk of a query is in its stage."""
        return query * ROWS + (chunk ^ query % MATRIX) * (CHUNK // ELEMENT)

    @cute.jit
    def fetch(self, step: ListStep, bounds: Matrices, edge: cutlass.Constexpr):
        """Takes the bias of a thread's scores from shared memory."""
        found = None
        if const_expr(edge is not None):
            ring = bounds.ring
            state = PipelineStateSimple(self.stages, step.taken)
            ring.pipeline.consumer_wait(state)
            elements = CHUNK // ELEMENT
            found = cute.make_rmem_tensor((elements, LOADS), self.dtype)
            atom = cute.make_copy_atom(
                warp.LdMatrix8x8x16bOp(transpose=True, num_matrices=MATRICES), self.dtype
            )
            stage = ring.stages[None, None, state.index].iterator + bounds.first
            for i in cutlass.range_constexpr(LOADS):
                row = (stage + i * 2 * MATRIX * ROWS).align(CHUNK)
                cute.copy(atom, cute.make_tensor(row, cute.make_layout(elements)), found[None, i])
            ring.pipeline.consumer_release(state)
        return found

    @cute.jit
    def mask(
        self,
        scores,
        step: ListStep,
        bounds: Matrices,
        edge: cutlass.Constexpr,
        bias: Bias,
        fetched,
    ):
        """Adds their bias to the scores of a query tile."""
        if const_expr(edge is not None):
            # In the accumulator, too, two columns follow two rows: [column, row, eight columns].
            flat = cute.make_tensor(scores.iterator, cute.make_layout(cute.size(scores)))
            elements = cute.make_tensor(fetched.iterator, cute.make_layout(cute.size(fetched)))
            for i in cutlass.range_constexpr(cute.size(flat)):
                flat[i] = biases.added(flat[i], elements[i], bias.inverse_scale, edge.careful)

    # The way through shared memory

    def shared_elements(self) -> int:
        return ROWS * ROWS * self.stages

    def shared_barriers(self) -> int:
        return 2 * self.stages

    def ring(self, elements, barriers) -> Ring:
        shape = cute.make_layout((ROWS, ROWS, self.stages))
        return Ring(
            elements.get_tensor(shape),
            staging.copy_pipeline(barriers, self.stages, PARTS, WARPS),
        )

    @cute.jit
    def load(self, tile: KeyTile, bias: Bias, ring: Ring, part: Int32):
        """Brings the bias of the query tiles that have one, or a part of it."""
        wide = self.is_wide(tile, bias)
        step = self.first(tile, bias)
        for _ in cutlass.range(self.steps(tile, bias), unroll=1):
            if step.position >= step.free_end:
                query = self.number(tile, step, bias) * ROWS
                state = staging.producer_state(self.stages, step.taken)
                ring.pipeline.producer_acquire(state)
                stage = ring.stages[None, None, state.index]
                if wide:
                    self.copy(tile, step, bias, query, stage, part, WIDE)
                else:
                    self.copy(tile, step, bias, query, stage, part, NARROW)
                cute.arch.cp_async_mbarrier_arrive_noinc(ring.pipeline.producer_get_barrier(state))
            step = self.following(tile, step, bias)

    @cute.jit
    def is_wide(self, tile: KeyTile, bias: Bias):
        """Whether every row of the bias begins at a chunk, and has whole ones."""
        offsets = bias.bias.iterator.toint() // ELEMENT | tile.keys
        for stride in bias.bias.stride[:-1]:
            offsets = offsets | stride
        return offsets % (CHUNK // ELEMENT) == 0

    @cute.jit
    def copy(
        self,
        tile: KeyTile,
        step: ListStep,
        bias: Bias,
        query: Int32,
        stage,
        part,
        width: cutlass.Constexpr,
    ):
        """Copies the bias of half the queries from `query` on. Behind the last query and the last
        key it takes theirs, so that nothing branches."""
        lanes = ROW_BYTES // width  # that copy a query
        rows = WARP // lanes
        lane = cute.arch.lane_idx()
        elements = width // ELEMENT
        column = lane % lanes * elements
        key = cutlass.min(tile.row + column, (tile.keys - 1) // elements * elements)
        mode = cpasync.LoadCacheMode.GLOBAL if width == WIDE else cpasync.LoadCacheMode.ALWAYS
        atom = cute.make_copy_atom(
            cpasync.CopyG2SOp(cache_mode=mode), Int32, num_bits_per_copy=8 * width
        )
        words = cute.make_layout(width // 4)
        for i in cutlass.range_constexpr(ROWS // PARTS // rows):
            row = part * (ROWS // PARTS) + i * rows + lane // lanes
            last = cutlass.min(query + row, tile.rows - 1)
            start = biases.row_of(bias.bias, tile.batch, tile.query_head(step.head), last)
            start += Int64(key)
            source = (bias.bias.iterator + start).align(width)
            within = column % (CHUNK // ELEMENT)
            target = stage.iterator + self.element(row, column // (CHUNK // ELEMENT)) + within
            source, target = (
                cute.make_tensor(cute.recast_ptr(x, dtype=Int32), words)
                for x in (source, target.align(width))
            )
            cute.copy(atom, source, target)
