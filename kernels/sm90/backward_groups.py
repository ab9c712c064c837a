"""The SM90 backward of grouped heads in one pass: dK and dV, and dQ added up in memory.

A CTA has 128 keys of one key/value head, 64 for each of two warpgroups, and goes over the query
tiles of all query heads of the group, so that dK and dV are complete in its registers. Per query
tile a warpgroup computes

    S^T = K Q^T,  P^T = exp(scale S^T - logsumexp),  dV += P^T dO,
    dP^T = V dO^T,  dS^T = P^T (dP^T - delta),  dK += dS^T Q

with P^T and dS^T as operands from registers. dS^T also goes to shared memory, where both
warpgroups find that of all keys for dQ = dS K, of which each computes half of the columns. They add
it to the fp32 accumulator in memory from registers, in the order in which they hold it, which is
the one that the postprocess kernel expects.

dQ of a query tile is computed in the step of the next one. So no warpgroup waits for the other's
dS, and one computes exponentials while the tensor cores work for the other.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, pipeline
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.utils import LayoutEnum, SmemAllocator
from flash_attn.cute import utils
from flash_attn.cute.pipeline import PipelineStateSimple
from quack import copy_utils, layout_utils, sm90_utils

from kernels.common import packed, symbolic, tile_slots
from kernels.kernel import Kernel, Layout, Mask
from kernels.sm90 import backward_parts, backward_statistics, staging
from kernels.sm90.backward_parts import Loads, store_gradient
from kernels.sm90.backward_statistics import DELTA, LANE_STATISTICS, LSE, Statistics
from kernels.sm90.key_tiles import KeyTile, Sizes
from kernels.sm90.masks import Edge, KeyBounds, Masks
from kernels.sm90.output import Output
from kernels.sm90.softmax import LOG2_E
from kernels.sm90.staging import Load
from kernels.sm90.warpgroups import ROWS, WARPGROUP, WARPS
from kernels.sm90.window import Window

COMPUTING = 2  # warpgroups that compute
DS_STAGES = 2  # this step's dS, and that of the step before
VECTOR = 4  # fp32 in 16 bytes
# Up to this head dim registers hold the next S, too, while dS is computed.
AHEAD = 64


@dataclass
class GroupTile(KeyTile):
    """What a CTA works on, and where the workspace has logsumexp, delta and dQ."""

    workspace_row: Int32  # varlen: of the sequence's first query


class Step(NamedTuple):
    """The work on a query tile of a head."""

    number: Int32
    query_tile: Int32
    head: Int32


@dataclass(frozen=True)
class Warpgroup:
    """What a warpgroup works with."""

    index: Int32
    thread: Int32  # in the warpgroup
    loads: Loads
    statistics: Statistics
    ds: staging.PipelineAsync  # of the stages of dS
    copy_ds: object  # to shared memory
    dq: cute.Tensor  # [batch, heads, elements of a head], varlen without the batch
    mma_scores: cute.TiledMma
    mma_sums: cute.TiledMma
    mma_dq: cute.TiledMma
    # what the products read and write
    frag_k: cute.Tensor
    frag_v: cute.Tensor
    frag_q: cute.Tensor
    frag_dout: cute.Tensor
    frag_q_summed: cute.Tensor
    frag_dout_summed: cute.Tensor
    frag_ds: cute.Tensor
    frag_k_of_dq: cute.Tensor
    scores: cute.Tensor  # S^T, then P^T
    d_scores: cute.Tensor  # dP^T, then dS^T
    weights_p: cute.Tensor  # in 16 bits
    weights_ds: cute.Tensor
    sums_k: cute.Tensor  # dK
    sums_v: cute.Tensor  # dV
    part_of_dq: cute.Tensor
    lse: cute.Tensor  # of the queries of a thread's columns
    delta: cute.Tensor


@dsl_user_op
def add_vector(address: Int64, values, *, loc=None, ip=None):
    """Adds to four neighbouring fp32 in device memory."""
    llvm.inline_asm(
        None,
        [
            Int64(address).ir_value(loc=loc, ip=ip),
            *(Float32(value).ir_value(loc=loc, ip=ip) for value in values),
        ],
        "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};",
        "l,f,f,f,f",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


class BackwardGroups:
    def __init__(self, kernel: Kernel):
        if (kernel.block_m, kernel.block_n) != (ROWS, COMPUTING * ROWS):
            raise ValueError(f"{kernel.name} must have tiles of {ROWS} x {COMPUTING * ROWS}")
        if kernel.head_dim != kernel.head_dim_v or kernel.q_stages != kernel.do_stages:
            raise ValueError(f"{kernel.name} must have equal head dims, and equal stages")
        if kernel.mask not in (Mask.FULL, Mask.CAUSAL):
            raise ValueError(f"{kernel.name} must be full or causal")
        self.dtype, self.head_dim = symbolic.DTYPES[kernel.dtype], kernel.head_dim
        self.keys = kernel.block_n
        self.stages = kernel.q_stages
        self.consumer_registers = kernel.consumer_registers
        self.producer_registers = kernel.producer_registers
        self.varlen, self.causal = kernel.layout is Layout.VARLEN, kernel.mask is Mask.CAUSAL
        self.ahead = self.head_dim <= AHEAD
        # The rows of the scores are keys and their columns queries.
        self.masks = Masks(replace(kernel, block_n=ROWS), ROWS)
        self.output = Output(kernel, self.dtype, ROWS, by_tma=False)

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        dout: cute.Tensor,
        lse_log2: cute.Tensor,
        delta: cute.Tensor,
        dq_accum: cute.Tensor,
        dk: cute.Tensor,
        dv: cute.Tensor,
        scale: Float32,
        cu_seqlens_q: cute.Tensor | None,
        cu_seqlens_k: cute.Tensor | None,
        heads_together: Int32,
        stream: cuda.CUstream,
    ):
        offsets_q, offsets_k = None, None
        if const_expr(self.varlen):
            offsets_q = packed.Offsets(cu_seqlens_q, q.shape[0])
            offsets_k = packed.Offsets(cu_seqlens_k, k.shape[0])
        sizes = Sizes.of(q, k, offsets_k, self.keys, heads_together)
        if const_expr(self.varlen):
            q, k, v, dout = (packed.sequences(tensor) for tensor in (q, k, v, dout))
        q, k, v, dout = (
            staging.by_head(packed.assume_tensor_aligned(tensor)) for tensor in (q, k, v, dout)
        )
        dk, dv = (packed.assume_tensor_aligned(tensor) for tensor in (dk, dv))
        streamed = staging.smem_layout(self.dtype, ROWS, self.head_dim, self.stages)
        # The warpgroups divide the columns of K for dQ, so no swizzled row may have more of them.
        layout_k = sm90_utils.make_smem_layout(
            self.dtype, LayoutEnum.ROW_MAJOR, (self.keys, self.head_dim), 1,
            major_mode_size=self.head_dim // COMPUTING,
        )  # fmt: skip
        layout_v = staging.smem_layout(self.dtype, self.keys, self.head_dim, 1)
        layout_ds = staging.smem_layout(self.dtype, self.keys, ROWS, DS_STAGES)
        load = cpasync.CopyBulkTensorTileG2SOp()
        atom_q, tma_q = staging.tma(load, q, streamed, ROWS, self.head_dim)
        atom_k, tma_k = staging.tma(load, k, layout_k, self.keys, self.head_dim)
        atom_v, tma_v = staging.tma(load, v, layout_v, self.keys, self.head_dim)
        atom_do, tma_do = staging.tma(load, dout, streamed, ROWS, self.head_dim)
        by_keys, by_columns = (COMPUTING, 1, 1), (1, COMPUTING, 1)
        mma_scores = sm90_utils.make_tiled_mma(self.dtype, "K", "K", ROWS, atom_layout_mnk=by_keys)
        mma_sums = sm90_utils.make_tiled_mma(
            self.dtype, "K", "MN", self.head_dim, source="RS", atom_layout_mnk=by_keys
        )
        mma_dq = sm90_utils.make_tiled_mma(
            self.dtype, "MN", "MN", self.head_dim // COMPUTING, atom_layout_mnk=by_columns
        )
        self.kernel(
            atom_q, tma_q, atom_k, tma_k, atom_v, tma_v, atom_do, tma_do, lse_log2, delta,
            dq_accum, dk, dv, scale, offsets_q, offsets_k, sizes, streamed, layout_k, layout_v,
            layout_ds, mma_scores, mma_sums, mma_dq,
        ).launch(
            grid=[sizes.blocks * sizes.heads, 1, 1], block=[(1 + COMPUTING) * WARPGROUP, 1, 1],
            stream=stream, min_blocks_per_mp=1
        )  # fmt: skip

    def shared_storage(self, streamed, layout_k, layout_v, layout_ds, statistics):
        ring = cute.struct.MemRange[cutlass.Int64, self.stages * 2]

        @cute.struct
        class Storage:
            q: staging.elements(self.dtype, streamed)
            dout: staging.elements(self.dtype, streamed)
            k: staging.elements(self.dtype, layout_k)
            v: staging.elements(self.dtype, layout_v)
            ds: staging.elements(self.dtype, layout_ds)
            rows: cute.struct.Align[cute.struct.MemRange[Float32, cute.cosize(statistics)], 16]
            barriers_q: ring
            barriers_do: ring
            barriers_k: cute.struct.MemRange[cutlass.Int64, 2]
            barriers_v: cute.struct.MemRange[cutlass.Int64, 2]
            barriers_ds: cute.struct.MemRange[cutlass.Int64, DS_STAGES * 2]
            barriers_rows: ring

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
        atom_do: cute.CopyAtom,
        tma_do: cute.Tensor,
        lse_log2: cute.Tensor,
        delta: cute.Tensor,
        dq_accum: cute.Tensor,
        dk: cute.Tensor,
        dv: cute.Tensor,
        scale: Float32,
        offsets_q: packed.Offsets | None,
        offsets_k: packed.Offsets | None,
        sizes: Sizes,
        streamed: cute.ComposedLayout,
        layout_k: cute.ComposedLayout,
        layout_v: cute.ComposedLayout,
        layout_ds: cute.ComposedLayout,
        mma_scores: cute.TiledMma,
        mma_sums: cute.TiledMma,
        mma_dq: cute.TiledMma,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for atom in (atom_q, atom_k, atom_v, atom_do):
                cpasync.prefetch_descriptor(atom)
        statistics = backward_statistics.layout(self.stages)
        storage = SmemAllocator().allocate(
            self.shared_storage(streamed, layout_k, layout_v, layout_ds, statistics)
        )
        both = COMPUTING * WARPS
        pipeline_q = staging.tma_pipeline(
            self.dtype, storage.barriers_q, streamed, self.stages, both
        )
        pipeline_do = staging.tma_pipeline(
            self.dtype, storage.barriers_do, streamed, self.stages, both
        )
        pipeline_k = staging.tma_pipeline(self.dtype, storage.barriers_k, layout_k, 1, both)
        pipeline_v = staging.tma_pipeline(self.dtype, storage.barriers_v, layout_v, 1, both)
        pipeline_rows = staging.warp_pipeline(storage.barriers_rows, self.stages, 1, both)
        pipeline_ds = staging.warp_pipeline(storage.barriers_ds, DS_STAGES, both, both)
        pipeline.pipeline_init_arrive()
        sq = storage.q.get_tensor(streamed.outer, swizzle=streamed.inner)
        sdo = storage.dout.get_tensor(streamed.outer, swizzle=streamed.inner)
        sk = storage.k.get_tensor(layout_k.outer, swizzle=layout_k.inner)
        sv = storage.v.get_tensor(layout_v.outer, swizzle=layout_v.inner)
        sds = storage.ds.get_tensor(layout_ds.outer, swizzle=layout_ds.inner)
        loads = Loads(
            Load(atom_q, tma_q, sq, pipeline_q),
            Load(atom_k, tma_k, sk, pipeline_k),
            Load(atom_v, tma_v, sv, pipeline_v),
            Load(atom_do, tma_do, sdo, pipeline_do),
        )
        rows = Statistics(lse_log2, delta, storage.rows.get_tensor(statistics), pipeline_rows)
        tile = self.tile(sizes, offsets_q, offsets_k)
        pipeline.pipeline_init_wait()
        if tile.row < tile.keys:
            if warp < WARPS:
                cute.arch.setmaxregister_decrease(self.producer_registers)
                if warp == 0:
                    self.load(tile, loads)
                if warp == 1:
                    self.load_statistics(tile, rows)
            else:
                cute.arch.setmaxregister_increase(self.consumer_registers)
                wg = self.warpgroup(
                    loads, rows, pipeline_ds, sds, dq_accum, mma_scores, mma_sums, mma_dq
                )
                self.compute(wg, tile, scale * LOG2_E)
                row = tile.row + wg.index * ROWS
                store_gradient(self.output, tile, row, wg.thread, wg.sums_v, Float32(1.0), dv)
                store_gradient(self.output, tile, row, wg.thread, wg.sums_k, scale, dk)

    # What a CTA works on

    @cute.jit
    def tile(self, sizes: Sizes, offsets_q, offsets_k) -> GroupTile:
        cta, _, _ = cute.arch.block_idx()
        rows, keys = sizes.rows, sizes.keys
        end_q, end_k, workspace_row = Int32(0), Int32(0), Int32(0)
        if const_expr(self.varlen):
            place = tile_slots.packed_place(cta, offsets_k, self.keys)
            head, index, batch = place.head, place.sequence, Int32(0)
            begin_q, end_q, end_k = offsets_q[index], offsets_q[index + 1], offsets_k[index + 1]
            rows = cutlass.max(end_q - begin_q, 0)
            keys = end_k - offsets_k[index] if place.tiles > 0 else 0
            workspace_row = (begin_q + index * ROWS) // ROWS * ROWS
        else:
            place = backward_parts.dense_place(cta, sizes.blocks, sizes.heads, sizes.together)
            head, batch = place.head % sizes.heads_kv, place.head // sizes.heads_kv
        row = place.tile * self.keys if place.tiles > 0 else 0
        begin, end, _ = self.query_tiles(row, self.keys, rows, keys)
        return GroupTile(
            row, head, batch, rows, keys, end_q, end_k, begin, end, sizes.ratio, workspace_row
        )

    @cute.jit
    def query_tiles(self, row: Int32, count: cutlass.Constexpr, rows: Int32, keys: Int32):
        """Which query tiles see any of `count` keys from `row` on, [begin, end), and from which one
        on, at most `end`, they see all of these."""
        begin, end, free = Int32(0), cute.ceil_div(rows, ROWS), Int32(0)
        if const_expr(self.causal):
            # A key is seen by the queries from its own position on.
            first, last = row + rows - keys, cutlass.min(row + count, keys) - 1 + rows - keys
            begin = cutlass.max(first, 0) // ROWS
            free = cute.ceil_div(cutlass.max(last, 0), ROWS)
        if row + count > keys:
            free = end
        return begin, end, free

    def steps(self, tile: GroupTile) -> Int32:
        return tile.heads * (tile.end - tile.begin)

    def at(self, number: Int32, tile: GroupTile) -> Step:
        """The step of a number: head by head, from a head's first query tile on."""
        tiles = tile.end - tile.begin
        return Step(number, tile.begin + number % tiles, tile.query_head(number // tiles))

    # The warps that load

    @cute.jit
    def load(self, tile: GroupTile, loads: Loads):
        """Loads the keys and values, and Q and dO of all query tiles."""
        first = staging.producer_state(1, Int32(0))
        for once in (loads.k, loads.v):
            source = staging.rows_of(
                once.source, tile.head, tile.batch, tile.keys, tile.end_k, self.varlen
            )
            staging.load_rows(once, source, tile.row, first)
        for number in cutlass.range(self.steps(tile), unroll=1):
            step, state = self.at(number, tile), staging.producer_state(self.stages, number)
            for streamed in (loads.q, loads.dout):
                source = staging.rows_of(
                    streamed.source, step.head, tile.batch, tile.rows, tile.end_q, self.varlen
                )
                staging.load_rows(streamed, source, step.query_tile * ROWS, state)

    @cute.jit
    def load_statistics(self, tile: GroupTile, statistics: Statistics):
        """Brings lse and delta of all query tiles. A query that is none gets an lse of infinity:
        its P is zero."""
        lane = cute.arch.lane_idx()
        for number in cutlass.range(self.steps(tile), unroll=1):
            step, state = self.at(number, tile), staging.producer_state(self.stages, number)
            whose = step.head, tile.batch, tile.workspace_row, self.varlen
            lse, delta = (
                staging.row_numbers(numbers, *whose)
                for numbers in (statistics.lse, statistics.delta)
            )
            backward_statistics.bring(
                statistics, lse, delta, step.query_tile * ROWS, tile.rows, lane, state,
                missing=Float32.inf,
            )  # fmt: skip

    # The warpgroups that compute

    def warpgroup(
        self, loads: Loads, statistics, pipeline_ds, stages_ds, dq, mma_scores, mma_sums, mma_dq
    ) -> Warpgroup:
        thread, _, _ = cute.arch.thread_idx()
        thread -= WARPGROUP
        index = cute.arch.make_warp_uniform(thread // WARPGROUP)
        first = index * WARPGROUP
        of_scores, of_sums = mma_scores.get_slice(first), mma_sums.get_slice(first)
        shape = (self.keys, ROWS, self.head_dim)
        scores, frag_k, frag_q = sm90_utils.partition_fragment_ABC(
            of_scores, shape, loads.k.stages, loads.q.stages
        )
        d_scores, frag_v, frag_dout = sm90_utils.partition_fragment_ABC(
            of_scores, shape, loads.v.stages, loads.dout.stages
        )
        shape = (self.keys, self.head_dim, ROWS)
        sums_k, weights_ds, frag_q_summed = sm90_utils.partition_fragment_ABC(
            of_sums, shape, None, layout_utils.transpose_view(loads.q.stages)
        )
        sums_v, weights_p, frag_dout_summed = sm90_utils.partition_fragment_ABC(
            of_sums, shape, None, layout_utils.transpose_view(loads.dout.stages)
        )
        part_of_dq, frag_ds, frag_k_of_dq = sm90_utils.partition_fragment_ABC(
            mma_dq.get_slice(first),
            (ROWS, self.head_dim, self.keys),
            layout_utils.transpose_view(stages_ds),
            layout_utils.transpose_view(loads.k.stages),
        )
        copy_ds, _, _ = copy_utils.get_smem_store_C(
            mma_scores, stages_ds, thread, position_independent=True
        )
        lse, delta = (cute.make_rmem_tensor(LANE_STATISTICS, Float32) for _ in (LSE, DELTA))
        return Warpgroup(
            index, thread % WARPGROUP, loads, statistics, pipeline_ds, copy_ds, dq, mma_scores,
            mma_sums, mma_dq, frag_k, frag_v, frag_q, frag_dout, frag_q_summed, frag_dout_summed,
            frag_ds, frag_k_of_dq, scores, d_scores, weights_p, weights_ds, sums_k, sums_v,
            part_of_dq, lse, delta,
        )  # fmt: skip

    @cute.jit
    def compute(self, wg: Warpgroup, tile: GroupTile, scale_log2: Float32):
        """Computes dK and dV, and adds to dQ."""
        wg.sums_k.fill(0.0)
        wg.sums_v.fill(0.0)
        bounds = self.bounds(wg, tile)
        first = PipelineStateSimple(1, Int32(0))
        for once in (wg.loads.k, wg.loads.v):
            once.pipeline.consumer_wait(first)
        if tile.end > tile.begin:
            self.issue_scores(wg, Int32(0))
            self.read_first_lse(wg)
            warpgroup.wait_group(0)
            own_row = tile.row + wg.index * ROWS
            _, _, free = self.query_tiles(own_row, ROWS, tile.rows, tile.keys)
            number = Int32(0)
            for h in cutlass.range(tile.heads, unroll=1):
                head = tile.query_head(h)
                end = tile.end - 1 if h == tile.heads - 1 else tile.end
                end_masked = cutlass.min(free, end)
                for query_tile in cutlass.range(tile.begin, end_masked, unroll=1):
                    step = Step(number, query_tile, head)
                    self.step(wg, tile, step, bounds, scale_log2, masked=True, more=True)
                    number += 1
                for query_tile in cutlass.range(end_masked, end, unroll=1):
                    step = Step(number, query_tile, head)
                    self.step(wg, tile, step, bounds, scale_log2, masked=False, more=True)
                    number += 1
            head = (tile.head + 1) * tile.heads - 1
            step = Step(number, tile.end - 1, head)
            self.step(wg, tile, step, bounds, scale_log2, masked=True, more=False)
            self.issue_dq(wg, number + 1)
            warpgroup.wait_group(0)
            self.add_dq(wg, self.address_of_dq(wg, tile, head, tile.end - 1))

    @cute.jit
    def step(
        self,
        wg: Warpgroup,
        tile: GroupTile,
        step: Step,
        bounds: KeyBounds,
        scale_log2: Float32,
        masked: cutlass.Constexpr,
        more: cutlass.Constexpr,
    ):
        """Works on a query tile, whose S is there, and on dQ of the one before. If there are more,
        S of the next is there at the end. No product is in flight then: the compiler would wait for
        it where the loop turns."""
        state = PipelineStateSimple(self.stages, step.number)
        slot = PipelineStateSimple(DS_STAGES, step.number)
        ahead, behind = const_expr(more and self.ahead), const_expr(more and not self.ahead)
        # Statistics are read a phase before they are needed: products keep shared memory busy.
        backward_statistics.read(wg.statistics, DELTA, wg.thread, state, wg.delta)
        wg.statistics.pipeline.consumer_release(state)
        self.issue_d_scores(wg, step.number)
        if const_expr(masked):
            window = Window(Int32(0), Int32(0))
            self.masks.mask(wg.scores, step.query_tile, bounds, Edge(left=True), window, None)
        self.probabilities(wg, scale_log2)
        self.issue_sums(wg, wg.sums_v, wg.weights_p, wg.frag_dout_summed, state)
        if const_expr(ahead):
            self.issue_scores(wg, step.number + 1)
        wg.ds.producer_acquire_w_index_phase(slot.index, slot.phase ^ 1)
        warpgroup.wait_group(2 if ahead else 1)
        self.derivatives(wg)
        if const_expr(more):
            following = PipelineStateSimple(self.stages, step.number + 1)
            wg.statistics.pipeline.consumer_wait(following)
            backward_statistics.read(wg.statistics, LSE, wg.thread, following, wg.lse)
        utils.cvt_f16(layout_utils.reshape_acc_to_frgA(wg.d_scores), wg.weights_ds)
        wg.copy_ds(wg.weights_ds, dst_idx=slot.index)
        self.issue_sums(wg, wg.sums_k, wg.weights_ds, wg.frag_q_summed, state)
        cute.arch.fence_view_async_shared()
        wg.ds.producer_commit(slot)
        self.issue_dq(wg, step.number)
        warpgroup.wait_group(1)
        wg.loads.dout.pipeline.consumer_release(state)
        wg.loads.q.pipeline.consumer_release(state)
        if const_expr(behind):
            self.issue_scores(wg, step.number + 1)
        warpgroup.wait_group(1 if behind else 0)
        if step.number > 0:
            # The stage of the step before, as issue_dq has it: its phase does not count here.
            wg.ds.consumer_release(PipelineStateSimple(DS_STAGES, step.number + 1))
            self.add_dq_before(wg, tile, step)
        if const_expr(behind):
            warpgroup.wait_group(0)

    @cute.jit
    def probabilities(self, wg: Warpgroup, scale_log2: Float32):
        """Replaces the scores by P^T, and rounds it to 16 bits."""
        weights = layout_utils.reshape_acc_to_mn(wg.scores)
        for c in cutlass.range_constexpr(LANE_STATISTICS):
            for r in cutlass.range_constexpr(2):
                exponent = weights[r, c] * scale_log2 - wg.lse[c]
                weights[r, c] = cute.math.exp2(exponent, fastmath=True)
        utils.cvt_f16(layout_utils.reshape_acc_to_frgA(wg.scores), wg.weights_p)

    @cute.jit
    def derivatives(self, wg: Warpgroup):
        """Replaces dP^T by dS^T = P^T (dP^T - delta). P^T is that of dV, in 16 bits: the next S may
        be in the registers of the other."""
        weights = cute.make_tensor(wg.weights_p.iterator, wg.scores.layout)
        weights = layout_utils.reshape_acc_to_mn(weights)
        differences = layout_utils.reshape_acc_to_mn(wg.d_scores)
        for c in cutlass.range_constexpr(LANE_STATISTICS):
            for r in cutlass.range_constexpr(2):
                differences[r, c] = Float32(weights[r, c]) * (differences[r, c] - wg.delta[c])

    def issue_scores(self, wg: Warpgroup, number):
        state = PipelineStateSimple(self.stages, number)
        wg.loads.q.pipeline.consumer_wait(state)
        self.issue_product(wg, wg.scores, wg.frag_k, wg.frag_q, state)

    def issue_d_scores(self, wg: Warpgroup, number):
        state = PipelineStateSimple(self.stages, number)
        wg.loads.dout.pipeline.consumer_wait(state)
        self.issue_product(wg, wg.d_scores, wg.frag_v, wg.frag_dout, state)

    def issue_product(self, wg: Warpgroup, scores, resident, streamed, state):
        resident = resident[None, None, None, 0]
        streamed = streamed[None, None, None, state.index]
        sm90_utils.gemm(wg.mma_scores, scores, resident, streamed, zero_init=True, wg_wait=-1)

    def issue_sums(self, wg: Warpgroup, sums, weights, summed, state):
        summed = summed[None, None, None, state.index]
        sm90_utils.gemm(wg.mma_sums, sums, weights, summed, wg_wait=-1)

    def issue_dq(self, wg: Warpgroup, number):
        """Issues dQ of the step before `number`. Before the first there is none: nothing is waited
        for, and what is computed is left alone."""
        slot = PipelineStateSimple(DS_STAGES, number + 2 * DS_STAGES - 1)
        wg.ds.consumer_wait(slot)
        ds, keys = wg.frag_ds[None, None, None, slot.index], wg.frag_k_of_dq[None, None, None, 0]
        sm90_utils.gemm(wg.mma_dq, wg.part_of_dq, ds, keys, zero_init=True, wg_wait=-1)

    @cute.jit
    def add_dq_before(self, wg: Warpgroup, tile: GroupTile, step: Step):
        """Adds dQ of the step before."""
        first = step.query_tile == tile.begin
        head = step.head - 1 if first else step.head
        query_tile = tile.end - 1 if first else step.query_tile - 1
        self.add_dq(wg, self.address_of_dq(wg, tile, head, query_tile))

    def address_of_dq(self, wg: Warpgroup, tile: GroupTile, head, query_tile) -> Int64:
        """Where a thread adds its part of a tile's dQ: its vectors lie among those of the
        warpgroup's other threads."""
        part = ROWS * self.head_dim // COMPUTING
        first = (tile.workspace_row // ROWS + query_tile) * COMPUTING + wg.index
        offset = first * part + wg.thread * VECTOR
        index = (head, offset) if self.varlen else (tile.batch, head, offset)
        return utils.elem_pointer(wg.dq, index).toint()

    @cute.jit
    def add_dq(self, wg: Warpgroup, address: Int64):
        count = cute.size(wg.part_of_dq)
        values = cute.make_tensor(wg.part_of_dq.iterator, cute.make_layout(count))
        bytes_apart = VECTOR * WARPGROUP * Float32.width // 8
        for i in cutlass.range_constexpr(count // VECTOR):
            vector = [values[VECTOR * i + j] for j in range(VECTOR)]
            add_vector(address + i * bytes_apart, vector)

    def read_first_lse(self, wg: Warpgroup):
        state = PipelineStateSimple(self.stages, Int32(0))
        wg.statistics.pipeline.consumer_wait(state)
        backward_statistics.read(wg.statistics, LSE, wg.thread, state, wg.lse)

    @cute.jit
    def bounds(self, wg: Warpgroup, tile: GroupTile) -> KeyBounds:
        """Which queries the keys of a thread's rows are seen by, as Masks takes it. A row that is
        no key is seen from a query on that there is not."""
        thread = wg.thread + wg.index * WARPGROUP
        where = cute.make_identity_tensor((self.keys, ROWS))
        where = layout_utils.reshape_acc_to_mn(wg.mma_scores.get_slice(thread).partition_C(where))
        first = []
        for r in cutlass.range_constexpr(2):
            key = tile.row + where[r, 0][0]
            own_query = key + tile.rows - tile.keys - where[0, 0][1]
            seen = own_query if self.causal else Int32(0)
            first.append(seen if key < tile.keys else tile.rows)
        return KeyBounds(tuple(first), (tile.rows,) * 2, Int32(0), Int32(0), Int32(0))


def entry(kernel: Kernel):
    return BackwardGroups(kernel), symbolic.arguments(kernel)
