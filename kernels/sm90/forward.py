"""The SM90 forward of many queries: a persistent kernel of our own.

A CTA stays on its SM and works on one query tile after the other, in the order of schedule.py. Its
warpgroups don't wait for a tile to begin: the first scores of the next tile are issued together
with the last product of this one. So the tensor cores have work during the next tile's first
softmax and this tile's last rescale and store. docs/kernels-sm90.md has the pipeline and the
barriers, docs/kernels-sm90-experiments.md what was tried.

The ratio of heads, lengths, strides and window bounds are run-time values, so there is one object
for each dtype, bucket, layout and kind of mask.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.pipeline import PipelineState
from cutlass.utils import SmemAllocator
from flash_attn.cute import utils
from flash_attn.cute.pipeline import PipelineStateSimple, PipelineTmaAsync
from quack import layout_utils, sm90_utils

from kernels.common import packed, symbolic
from kernels.common.pages import Table
from kernels.kernel import Kernel, Layout, Mask
from kernels.sm90 import schedule, staging
from kernels.sm90.barriers import Barrier
from kernels.sm90.output import Destination, Output
from kernels.sm90.pages import Boxes, Pages
from kernels.sm90.schedule import Ring, Schedule, Tile
from kernels.sm90.softmax import LOG2_E, Softmax, exponentials, rescale
from kernels.sm90.staging import Load
from kernels.sm90.visibility import Bounds, Visibility, masks_of, visibility_of
from kernels.sm90.warpgroups import ROWS, WARPGROUP, Turns

# The named barrier of the first warpgroup in pages, behind which are those of the others: its
# threads have cleared what is no value.
VALUES_CLEARED = max(Barrier) + 1


@dataclass(frozen=True)
class Loads:
    q: Load
    k: Load
    v: Load


@dataclass(frozen=True)
class Operands:
    """What the products of a warpgroup read and write."""

    mma_qk: cute.TiledMma
    mma_pv: cute.TiledMma
    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    p: cute.Tensor
    scores: cute.Tensor
    o: cute.Tensor


@dataclass(frozen=True)
class Warpgroup:
    """What a consuming warpgroup works with, whichever its tile."""

    index: Int32
    thread: Int32  # in the warpgroup
    visibility: Visibility
    operands: Operands
    values: cute.Tensor | None  # the stages of V, which are cleared of what is no value in pages
    softmax: Softmax  # of the tile at hand
    q: PipelineTmaAsync
    k: PipelineTmaAsync
    v: PipelineTmaAsync


class States(NamedTuple):
    """Where a warp is in each pipeline."""

    q: PipelineState | PipelineStateSimple
    k: PipelineState
    v: PipelineState
    tile: PipelineState


class Work(NamedTuple):
    """A warpgroup's part of a tile."""

    tile: Tile
    bounds: Bounds
    end: Int32  # of its key blocks


class Forward:
    def __init__(self, kernel: Kernel):
        self.dtype = symbolic.DTYPES[kernel.dtype]
        self.tile_m, self.tile_n = kernel.block_m, kernel.block_n
        self.head_dim, self.head_dim_v = kernel.head_dim, kernel.head_dim_v
        if self.tile_m % ROWS or self.tile_m // ROWS not in (1, 2, 3):
            raise ValueError(
                f"block_m of {kernel.name} must be one to three times {ROWS}, is {self.tile_m}"
            )
        self.warpgroups = self.tile_m // ROWS
        self.consumer_registers = kernel.consumer_registers
        self.producer_registers = kernel.producer_registers
        self.consumers = WARPGROUP * self.warpgroups
        self.stages = kernel.stages
        self.q_stages = kernel.q_stages * self.warpgroups  # each of a warpgroup's rows
        # the next tile's queries are loaded before this tile's last scores
        self.ahead = kernel.q_stages > 1
        self.turns = Turns(self.warpgroups, kernel.pingpong)
        self.biased, self.varlen = kernel.mask is Mask.BIAS, kernel.packed
        self.paged = kernel.layout is Layout.PAGED
        self.pages = Pages(self.dtype, self.tile_n, large=True)
        self.skips = self.warpgroups > 1 and not self.biased
        self.masks = masks_of(kernel, ROWS)
        self.schedule = Schedule(kernel)
        self.output = Output(kernel, self.dtype, ROWS, by_tma=self.ahead)

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        o: cute.Tensor,
        lse: cute.Tensor,
        scale: Float32,
        cu_seqlens_q: cute.Tensor | None,
        key_lengths: cute.Tensor | None,
        window_size_left: Int32,
        window_size_right: Int32,
        num_ctas: Int32,
        paired_heads: Int32,
        counter: cute.Tensor | None,
        bias: cute.Tensor | None,
        lists: cute.Tensor | None,
        cu_seqlens_k: cute.Tensor | None,
        seqused_k: cute.Tensor | None,
        block_table: cute.Tensor | None,
        stream: cuda.CUstream,
    ):
        *leading, heads, _ = q.shape
        heads_kv = k.shape[-2]
        if const_expr(not self.varlen):
            batch, rows = leading
            order = self.schedule.dense(rows, k.shape[1], heads, heads_kv, batch, paired_heads)
            num_ctas = cutlass.min(num_ctas, order.end)
        else:
            offsets_q = packed.Offsets(cu_seqlens_q, q.shape[0])
            if const_expr(self.paged):
                lengths_k = Table(block_table, cu_seqlens_k, seqused_k, k.shape[1])
            else:
                lengths_k = packed.KeyLengths(key_lengths, k.shape[0])
                k, v = packed.sequences(k), packed.sequences(v)
            order = schedule.Varlen(offsets_q, lengths_k, heads, heads_kv, counter)
            q = packed.sequences(q)
        if const_expr(self.varlen and self.output.by_tma):
            o = packed.sequences(o)
        q, k, v, o = (
            staging.by_head(packed.assume_tensor_aligned(tensor)) for tensor in (q, k, v, o)
        )
        sq_layout = staging.smem_layout(self.dtype, ROWS, self.head_dim, self.q_stages)
        sk_layout = staging.smem_layout(self.dtype, self.tile_n, self.head_dim, self.stages)
        sv_layout = staging.smem_layout(self.dtype, self.tile_n, self.head_dim_v, self.stages)
        so_layout = self.output.stages_layout()
        load = cpasync.CopyBulkTensorTileG2SOp()
        atom_q, tma_q = staging.tma(load, q, sq_layout, ROWS, self.head_dim)
        if const_expr(self.paged):
            small_k, (atom_k, tma_k) = self.pages.tma(load, k, self.head_dim)
            small_v, (atom_v, tma_v) = self.pages.tma(load, v, self.head_dim_v)
            small = small_k, small_v
        else:
            small = None
            atom_k, tma_k = staging.tma(load, k, sk_layout, self.tile_n, self.head_dim)
            atom_v, tma_v = staging.tma(load, v, sv_layout, self.tile_n, self.head_dim_v)
        atom_o = None
        if const_expr(self.output.by_tma):
            atom_o, o = self.output.tma(o)
        mma_qk = sm90_utils.make_tiled_mma(self.dtype, "K", "K", self.tile_n)
        mma_pv = sm90_utils.make_tiled_mma(self.dtype, "K", "MN", self.head_dim_v, source="RS")
        self.kernel(
            atom_q, tma_q, atom_k, tma_k, atom_v, tma_v, atom_o, o, lse, scale * LOG2_E,
            visibility_of(window_size_left, window_size_right, bias, lists, scale), order,
            sq_layout, sk_layout, sv_layout, so_layout, mma_qk, mma_pv, small,
        ).launch(
            grid=[num_ctas, 1, 1], block=[WARPGROUP + self.consumers, 1, 1], stream=stream,
            min_blocks_per_mp=1
        )  # fmt: skip

    def shared_storage(self, sq_layout, sk_layout, sv_layout, so_layout):
        @cute.struct
        class Storage:
            q: staging.elements(self.dtype, sq_layout)
            k: staging.elements(self.dtype, sk_layout)
            v: staging.elements(self.dtype, sv_layout)
            o: staging.elements(self.dtype, so_layout)
            barriers_q: cute.struct.MemRange[cutlass.Int64, self.q_stages * 2]
            barriers_k: cute.struct.MemRange[cutlass.Int64, self.stages * 2]
            barriers_v: cute.struct.MemRange[cutlass.Int64, self.stages * 2]
            barriers_tiles: self.schedule.ring_barriers()
            tiles: self.schedule.ring_words()

        return Storage

    @cute.kernel
    def kernel(
        self,
        atom_q: cute.CopyAtom,
        tma_q: cute.Tensor,
        atom_k: cute.CopyAtom,
        tma_k: cute.Tensor,
        atom_v: cute.CopyAtom,
        tma_v: cute.Tensor,
        atom_o: cute.CopyAtom | None,
        o: cute.Tensor,
        lse: cute.Tensor,
        scale_log2: Float32,
        visibility: Visibility,
        order: schedule.Dense | schedule.Varlen,
        sq_layout: cute.ComposedLayout,
        sk_layout: cute.ComposedLayout,
        sv_layout: cute.ComposedLayout,
        so_layout,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        small,  # in pages: a TMA atom and tensor for small boxes of K, and of V
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            atoms_of_small = [atom for atom, _ in small] if self.paged else []
            atoms_of_o = [atom_o] if self.output.by_tma else []
            for atom in (atom_q, atom_k, atom_v, *atoms_of_o, *atoms_of_small):
                cpasync.prefetch_descriptor(atom)
        storage = SmemAllocator().allocate(
            self.shared_storage(sq_layout, sk_layout, sv_layout, so_layout)
        )
        warps = self.consumers // 32
        pipeline_q = staging.tma_pipeline(
            self.dtype, storage.barriers_q, sq_layout, self.q_stages, WARPGROUP // 32
        )
        pipeline_k = staging.tma_pipeline(
            self.dtype, storage.barriers_k, sk_layout, self.stages, warps
        )
        pipeline_v = staging.tma_pipeline(
            self.dtype, storage.barriers_v, sv_layout, self.stages, warps
        )
        ring = self.schedule.ring(storage.barriers_tiles, storage.tiles, readers=warps + 1)
        pipeline.pipeline_init_arrive()
        sq = storage.q.get_tensor(sq_layout.outer, swizzle=sq_layout.inner)
        sk = storage.k.get_tensor(sk_layout.outer, swizzle=sk_layout.inner)
        sv = storage.v.get_tensor(sv_layout.outer, swizzle=sv_layout.inner)
        so = None
        if const_expr(self.output.by_tma):
            so = storage.o.get_tensor(so_layout.outer, swizzle=so_layout.inner)
        loads = Loads(
            Load(atom_q, tma_q, sq, pipeline_q),
            Load(atom_k, tma_k, sk, pipeline_k),
            Load(atom_v, tma_v, sv, pipeline_v),
        )
        pipeline.pipeline_init_wait()
        if warp < WARPGROUP // 32:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if warp == 0:
                if const_expr(self.paged):
                    self.load_pages(order, ring, loads, small)
                else:
                    self.load(order, visibility, ring, loads)
            if warp == 1:
                self.schedule.run(order, visibility, ring)
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            to = Destination(o, lse, atom_o, so)
            self.attend(order, visibility, ring, loads, mma_qk, mma_pv, scale_log2, to)

    @cute.jit
    def load(self, order, visibility: Visibility, ring: Ring, loads: Loads):
        """Loads queries, keys and values of all tiles, in the order in which the consumers take
        them."""
        q, k, v = loads.q, loads.k, loads.v
        producer = pipeline.PipelineUserType.Producer
        state_q = pipeline.make_pipeline_state(producer, self.q_stages)
        state_k = pipeline.make_pipeline_state(producer, self.stages)
        state_v = pipeline.make_pipeline_state(producer, self.stages)
        state_t = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, schedule.RING)
        tile = self.schedule.read(order, ring, state_t)
        state_t.advance()
        while tile.end > 0:
            self.masks.load_block(k, tile, tile.begin, visibility, state_k)
            state_k.advance()
            queries = self.queries(q, tile)
            for i in cutlass.range_constexpr(self.warpgroups):
                staging.load_rows(q, queries, tile.row + i * ROWS, state_q)
                state_q.advance()
            for position in cutlass.range(tile.begin + 1, tile.end, unroll=1):
                self.masks.load_block(k, tile, position, visibility, state_k)
                state_k.advance()
                self.masks.load_block(v, tile, position - 1, visibility, state_v)
                state_v.advance()
            self.masks.load_block(v, tile, tile.end - 1, visibility, state_v)
            state_v.advance()
            tile = self.schedule.read(order, ring, state_t)
            state_t.advance()
        # This warp must not exit before the consumers' last arrivals on the barriers in its CTA's
        # shared memory.
        q.pipeline.producer_tail(state_q)
        k.pipeline.producer_tail(state_k)
        v.pipeline.producer_tail(state_v)

    @cute.jit
    def load_pages(self, order, ring: Ring, loads: Loads, small):
        """The same from pages. Those of a key block are found while the one before is loaded."""
        q, (small_k, small_v) = loads.q, small
        k, v = Boxes.of(loads.k, small_k), Boxes.of(loads.v, small_v)
        producer = pipeline.PipelineUserType.Producer
        state_q = pipeline.make_pipeline_state(producer, self.q_stages)
        state_k = pipeline.make_pipeline_state(producer, self.stages)
        state_v = pipeline.make_pipeline_state(producer, self.stages)
        state_t = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, schedule.RING)
        tile = self.schedule.read(order, ring, state_t)
        state_t.advance()
        while tile.end > 0:
            found = self.find(order, tile, tile.begin)
            following = self.find(order, tile, tile.begin + 1)
            self.load_keys(k, order, tile, tile.begin, found, state_k)
            state_k.advance()
            queries = self.queries(q, tile)
            for i in cutlass.range_constexpr(self.warpgroups):
                staging.load_rows(q, queries, tile.row + i * ROWS, state_q)
                state_q.advance()
            for block in cutlass.range(tile.begin + 1, tile.end, unroll=1):
                before, found = found, following
                following = self.find(order, tile, block + 1)
                self.load_keys(k, order, tile, block, found, state_k)
                state_k.advance()
                self.load_values(v, order, tile, block - 1, before, state_v)
                state_v.advance()
            self.load_values(v, order, tile, tile.end - 1, found, state_v)
            state_v.advance()
            tile = self.schedule.read(order, ring, state_t)
            state_t.advance()
        q.pipeline.producer_tail(state_q)
        loads.k.pipeline.producer_tail(state_k)
        loads.v.pipeline.producer_tail(state_v)

    def find(self, order: schedule.Varlen, tile: Tile, block: Int32) -> Int32:
        return self.pages.find(order.key_lengths, tile.end_k, tile.keys, block)

    def load_keys(self, k: Boxes, order: schedule.Varlen, tile: Tile, block, found, state):
        self.pages.load(k, self.head_dim, order.key_lengths, tile.head_kv, block, found, state)

    def load_values(self, v: Boxes, order: schedule.Varlen, tile: Tile, block, found, state):
        self.pages.load(v, self.head_dim_v, order.key_lengths, tile.head_kv, block, found, state)

    def queries(self, q: Load, tile: Tile) -> cute.Tensor:
        return staging.rows_of(q.source, tile.head, tile.batch, tile.rows, tile.end_q, self.varlen)

    def operands(self, loads: Loads, mma_qk, mma_pv) -> Operands:
        _, frag_q, frag_k = sm90_utils.partition_fragment_ABC(
            mma_qk.get_slice(0),
            (ROWS, self.tile_n, self.head_dim),
            loads.q.stages,
            loads.k.stages,
        )
        acc_o, frag_p, frag_v = sm90_utils.partition_fragment_ABC(
            mma_pv.get_slice(0),
            (ROWS, self.head_dim_v, self.tile_n),
            None,
            layout_utils.transpose_view(loads.v.stages),
        )
        scores = cute.make_rmem_tensor(mma_qk.partition_shape_C((ROWS, self.tile_n)), Float32)
        return Operands(mma_qk, mma_pv, frag_q, frag_k, frag_v, frag_p, scores, acc_o)

    @cute.jit
    def attend(
        self,
        order,
        visibility: Visibility,
        ring: Ring,
        loads: Loads,
        mma_qk,
        mma_pv,
        scale_log2,
        to: Destination,
    ):
        """Computes the attention of one warpgroup's rows of all tiles."""
        thread, _, _ = cute.arch.thread_idx()
        index = cute.arch.make_warp_uniform(thread // WARPGROUP) - 1
        thread = thread % WARPGROUP
        operands = self.operands(loads, mma_qk, mma_pv)
        operands.o.fill(0.0)
        # `softmax` is the current tile's, `ended` that of the tile that is being finished.
        softmax, ended = Softmax.create(scale_log2), Softmax.create(scale_log2)
        softmax.begin()
        group = Warpgroup(
            index,
            thread,
            visibility,
            operands,
            loads.v.stages if self.paged else None,
            softmax,
            loads.q.pipeline,
            loads.k.pipeline,
            loads.v.pipeline,
        )
        consumer = pipeline.PipelineUserType.Consumer
        states = States(
            PipelineStateSimple(self.q_stages, index),
            pipeline.make_pipeline_state(consumer, self.stages),
            pipeline.make_pipeline_state(consumer, self.stages),
            pipeline.make_pipeline_state(consumer, schedule.RING),
        )
        self.turns.begin(index)

        tile = self.schedule.read(order, ring, states.tile)
        states.tile.advance()
        work = self.work(group, tile)
        more = tile.end > 0  # a grid of packed sequences may have more CTAs than tiles
        if more:
            states = self.prologue(group, work, states)
        while more:
            self.converge(index)
            states, accumulate = self.main_loop(group, work, states)
            for _ in cutlass.range_constexpr(self.warpgroups):
                states.q.advance()
            tile = self.schedule.read(order, ring, states.tile)
            states.tile.advance()
            more = tile.end > 0
            ended.reference.store(softmax.reference.load())
            ended.total.store(softmax.total.load())
            work, states = self.hand_over(group, work, tile, ended, states, accumulate, to)
        self.output.finish()

    def work(self, group: Warpgroup, tile: Tile) -> Work:
        bounds = self.masks.key_bounds(
            tile, group.visibility, group.index, group.thread, group.operands.mma_qk
        )
        return Work(tile, bounds, self.end(tile, bounds))

    @cute.jit
    def prologue(self, group: Warpgroup, work: Work, states: States) -> States:
        """Computes the weights of the first tile's first key block."""
        group.q.consumer_wait(states.q)
        group.k.consumer_wait(states.k)
        self.issue_scores(group.operands, states)
        warpgroup.wait_group(0)
        group.k.consumer_release(states.k)
        states.k.advance()
        if work.tile.begin + 1 == work.end:
            group.q.consumer_release(states.q)
        self.weigh_first(group, work.tile, work.bounds)
        self.convert_weights(group.operands)
        return states

    @cute.jit
    def weigh_first(self, group: Warpgroup, tile: Tile, bounds: Bounds):
        """Computes the weights of a tile's first key block, whose scores there are."""
        edge = self.masks.first_edge
        if const_expr(self.biased) and self.masks.sees_all(bounds, tile.begin):
            self.weigh(group, tile.begin, bounds, None, None)
        else:
            fetched = self.masks.fetch(tile.begin, bounds, group.visibility, edge)
            self.weigh(group, tile.begin, bounds, edge, fetched)

    @cute.jit
    def weigh(
        self, group: Warpgroup, position, bounds: Bounds, edge: cutlass.Constexpr, fetched
    ) -> Boolean:
        """Computes the weights of a key block, whose scores there are. Returns whether O must be
        rescaled."""
        scores, large = group.operands.scores, False
        if const_expr(edge is not None):
            self.masks.mask(scores, position, bounds, edge, group.visibility, fetched)
            large = edge.biased
        return exponentials(scores, group.softmax, large)

    @cute.jit
    def main_loop(self, group: Warpgroup, work: Work, states: States) -> tuple[States, Boolean]:
        """Computes the weights of the key blocks after the first, each while P V of the block
        before runs. Returns whether O holds a product already, to which the tile's last P V is
        added."""
        accumulate = Boolean(False)  # the tile's first product overwrites O
        spans = self.masks.spans(work.tile.begin + 1, work.end, work.bounds)
        for i in cutlass.range_constexpr(len(spans)):
            span = spans[i]
            for position in cutlass.range(span.begin, span.end, unroll=1):
                self.issue(group, states, accumulate)
                fetched = self.masks.fetch(position, work.bounds, group.visibility, span.edge)
                self.await_scores(group, states)
                states.k.advance()
                if position + 1 == work.end:
                    group.q.consumer_release(states.q)
                needed = self.weigh(group, position, work.bounds, span.edge, fetched)
                # The new weights take the place of those just used.
                warpgroup.wait_group(0)
                group.v.consumer_release(states.v)
                self.convert_weights(group.operands)
                rescale(group.operands.o, group.softmax.rescale, needed)
                states.v.advance()
                accumulate = Boolean(True)
        if const_expr(self.skips):
            for _ in cutlass.range(work.end, work.tile.end, unroll=1):
                self.skip(group.k, states.k)
                states.k.advance()
                self.turns.wait(group.index)
                self.turns.end(group.index)
        return states, accumulate

    @cute.jit
    def hand_over(
        self,
        group: Warpgroup,
        work: Work,
        upcoming: Tile,
        ended: Softmax,
        states: States,
        accumulate: Boolean,
        to: Destination,
    ) -> tuple[Work, States]:
        """Ends a tile and begins the next one, if any: the last product of this one runs beside the
        first scores of that one. `ended`: the sums of this one."""
        operands, softmax = group.operands, group.softmax
        bounds, upcoming_end = work.bounds, work.end
        if const_expr(self.paged):
            self.clear_unused(group, work, states)
        if upcoming.end > 0:
            bounds = self.masks.key_bounds(
                upcoming, group.visibility, group.index, group.thread, operands.mma_qk
            )
            upcoming_end = self.end(upcoming, bounds)
            softmax.begin()
            if const_expr(self.ahead):
                group.q.consumer_wait(states.q)
                # A branch between the issue of a product and the wait for it would make the
                # compiler wait at the branch, so each way has both.
                edge = self.masks.first_edge
                if self.masks.sees_all(bounds, upcoming.begin):
                    self.first_weights(group, upcoming, bounds, states, accumulate, None)
                else:
                    self.first_weights(group, upcoming, bounds, states, accumulate, edge)
                group.v.consumer_release(states.v)
                self.output.store(
                    work.tile, group.index, group.thread, operands.o, ended, to, operands.mma_pv
                )
            # The queries come while the last product is computed, and the store runs beside the
            # scores.
            else:
                self.issue_last(group, states, accumulate)
                group.q.consumer_wait(states.q)
                group.k.consumer_wait(states.k)
                self.issue_scores(operands, states)
                warpgroup.wait_group(1)
                group.v.consumer_release(states.v)
                self.output.store(
                    work.tile, group.index, group.thread, operands.o, ended, to, operands.mma_pv
                )
                warpgroup.wait_group(0)
                group.k.consumer_release(states.k)
                self.weigh_first(group, upcoming, bounds)
            states.k.advance()
            if upcoming.begin + 1 == upcoming_end:
                group.q.consumer_release(states.q)
            self.convert_weights(operands)
        else:
            self.issue_last(group, states, accumulate)
            warpgroup.wait_group(0)
            group.v.consumer_release(states.v)
            self.output.store(
                work.tile, group.index, group.thread, operands.o, ended, to, operands.mma_pv
            )
        states.v.advance()
        if const_expr(self.skips):
            for _ in cutlass.range(work.end, work.tile.end, unroll=1):
                self.skip(group.v, states.v)
                states.v.advance()
        return Work(upcoming, bounds, upcoming_end), states

    @cute.jit
    def clear_unused(self, group: Warpgroup, work: Work, states: States):
        """Clears what is no value of the sequence in the tile's last key block. Each warpgroup does
        so before it reads them: whichever clears later writes zeros over zeros."""
        unused = work.end * self.tile_n - work.tile.keys
        if unused > 0:
            group.v.consumer_wait(states.v)
            staging.clear_rows(
                group.values[None, None, states.v.index],
                (self.tile_n, self.head_dim_v),
                self.tile_n - unused,
                group.thread,
            )
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=VALUES_CLEARED + group.index, number_of_threads=WARPGROUP)

    @cute.jit
    def first_weights(
        self,
        group: Warpgroup,
        tile: Tile,
        bounds: Bounds,
        states: States,
        accumulate,
        edge: cutlass.Constexpr,
    ):
        """Computes the weights of a tile's first key block beside the last product of the tile
        before."""
        self.issue(group, states, accumulate)
        fetched = self.masks.fetch(tile.begin, bounds, group.visibility, edge)
        self.await_scores(group, states)
        self.weigh(group, tile.begin, bounds, edge, fetched)
        warpgroup.wait_group(0)

    @cute.jit
    def end(self, tile: Tile, bounds: Bounds) -> Int32:
        """The end of the key blocks that the warpgroup works on: those that any of its rows sees,
        and at least one. It keeps its last stage of values until the next tile: if it left out as
        many blocks as there are stages, the next tile's keys could not be loaded."""
        if const_expr(not self.skips):
            return tile.end
        end = cutlass.max(
            cute.ceil_div(bounds.any_end, self.tile_n), tile.begin + 1, tile.end - self.stages + 1
        )
        return cutlass.min(end, tile.end)

    def skip(self, pipeline, state):
        """Releases a key block that only other warpgroups' rows see."""
        pipeline.consumer_wait(state)
        pipeline.consumer_release(state)

    def issue(self, group: Warpgroup, states: States, accumulate):
        """Issues the scores of the next key block, and the product of the last one's weights and
        values."""
        group.k.consumer_wait(states.k, group.k.consumer_try_wait(states.k))
        self.turns.wait(group.index)
        self.issue_scores(group.operands, states)
        group.v.consumer_wait(states.v, group.v.consumer_try_wait(states.v))
        self.issue_output(group.operands, states, accumulate)
        self.turns.end(group.index)

    def issue_last(self, group: Warpgroup, states: States, accumulate):
        """Issues the product of a tile's last weights and values."""
        group.v.consumer_wait(states.v)
        self.turns.wait(group.index)
        self.issue_output(group.operands, states, accumulate)
        self.turns.end(group.index)

    def await_scores(self, group: Warpgroup, states: States):
        warpgroup.wait_group(1)
        group.k.consumer_release(states.k)

    def convert_weights(self, x: Operands):
        utils.cvt_f16(layout_utils.reshape_acc_to_frgA(x.scores), x.p)

    def issue_scores(self, x: Operands, states: States):
        q, k = x.q[None, None, None, states.q.index], x.k[None, None, None, states.k.index]
        sm90_utils.gemm(x.mma_qk, x.scores, q, k, zero_init=True, wg_wait=-1)

    @cute.jit
    def issue_output(self, x: Operands, states: States, accumulate):
        v = x.v[None, None, None, states.v.index]
        sm90_utils.gemm(x.mma_pv, x.o, x.p, v, zero_init=not accumulate, wg_wait=-1)

    def converge(self, index):
        """Tells the compiler that all threads of the warpgroup have the same tile, which it cannot
        know of values from shared memory. Without a barrier it keeps addresses and loops per lane,
        with 180 moves into uniform registers instead of 19. With pingpong, that barrier does it."""
        if const_expr(not self.turns.taken):
            cute.arch.barrier(barrier_id=Barrier.WARPGROUP_1 + index, number_of_threads=WARPGROUP)


def entry(kernel: Kernel):
    return Forward(kernel), symbolic.arguments(kernel)
