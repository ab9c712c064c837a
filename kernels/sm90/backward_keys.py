"""The second pass of the SM90 backward of large head dims: dK and dV.

A CTA has 64 keys of one key/value head, and goes over the query tiles of all query heads of the
group, so that dK and dV are complete in its registers. Nothing is added up in memory. Where key
blocks are too few for the SMs, the CTAs of a cluster divide the query tiles of a key block. Each
leaves its sums in its shared memory, and all of them add these up, in a fixed order.

Two warpgroups divide the work by its result. One computes

    S^T = K Q^T,  P^T = exp(scale S^T - logsumexp),  dV += P^T dO

and the other

    dP^T = V dO^T,  dS^T = P^T (dP^T - delta),  dK += dS^T Q

Both are the same loop: scores from a resident operand and a streamed tile, then a product of 16-bit
weights, which stay in registers, and the other streamed tile. The scores of a query tile are issued
together with the product of the tile before, so that the tensor cores have work during the
pointwise part. Accumulators of the scores have the same layout in both warpgroups, so a thread
hands its P^T to the thread of the same number, in vectors of 16 bytes through shared memory.

Shared memory is what bounds the kernel, so P^T is handed over in 16 bits: as fp16, times 2^8. That
rounds it by a relative error of at most 2^-11, an eighth of bf16's and as much as fp16's own, or
where it is small, by at most 2^-33.

Which query tiles a key block visits, and what of their scores is masked, is for key_masks.py to
say, or with a bias for key_lists.py.

The ratio of heads, lengths, strides and window bounds are run-time values.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, const_expr, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import SmemAllocator
from flash_attn.cute import utils
from flash_attn.cute.pipeline import PipelineAsync, PipelineStateSimple
from quack import layout_utils, sm90_utils

from kernels.common import packed, symbolic, tile_slots
from kernels.kernel import Kernel, Layout, Mask
from kernels.sm90 import backward_parts, backward_statistics, staging
from kernels.sm90.backward_parts import Loads, store_gradient
from kernels.sm90.backward_statistics import DELTA, LSE, Statistics
from kernels.sm90.barriers import Barrier
from kernels.sm90.key_lists import PARTS
from kernels.sm90.key_masks import ClusterTile
from kernels.sm90.key_tiles import KeyTile, Sizes
from kernels.sm90.output import Output
from kernels.sm90.softmax import LOG2_E
from kernels.sm90.staging import Load
from kernels.sm90.visibility import BoundsOfKeys, Step, Visibility, key_masks_of, visibility_of
from kernels.sm90.warpgroups import PAIR, ROW_LANES, ROWS, WARP, WARP_ROWS, WARPGROUP, WARPS

# P takes this power of two on its way. It is one at most, so fp16 leaves room for 256 times what it
# should be, where the caller's logsumexp is not that of these keys.
EXPONENT = 8
WEIGHTS = ROWS * ROWS // WARPGROUP  # of a thread
VECTOR_BYTES = 16
HANDED = 8  # fp16 elements of a vector
SUMS = 4  # fp32 of a vector: two neighbouring columns of both rows of a thread
# A named barrier of both warpgroups that compute.
STAGES_READ = max(Barrier) + 1


@dataclass(frozen=True)
class Handover:
    """P^T on its way from one warpgroup to the other."""

    slots: cute.Tensor  # [(elements of a vector, vectors), threads, slots]
    pipeline: PipelineAsync


@dataclass(frozen=True)
class Warpgroup:
    """What a warpgroup works with."""

    thread: Int32  # in the warpgroup
    resident: Load  # K or V
    scored: Load  # whose tiles the scores are of: Q or dO
    summed: Load  # whose tiles the weights multiply: dO or Q
    statistics: Statistics
    handover: Handover
    mma_scores: cute.TiledMma
    mma_sums: cute.TiledMma
    # what the products read and write
    frag_resident: cute.Tensor
    frag_scored: cute.Tensor
    frag_summed: cute.Tensor
    weights: cute.Tensor  # P^T or dS^T
    scores: cute.Tensor
    sums: cute.Tensor  # dV or dK


class Iteration(NamedTuple):
    """A step, and where the rings are in it and in the one before."""

    tile: ClusterTile
    step: Step
    visibility: Visibility
    bounds: BoundsOfKeys
    before: PipelineStateSimple
    state: PipelineStateSimple


class BackwardKeys:
    def __init__(self, kernel: Kernel):
        if (kernel.block_m, kernel.block_n) != (ROWS, ROWS):
            raise ValueError(f"block_m and block_n of {kernel.name} must be {ROWS}")
        if kernel.q_stages != kernel.do_stages:
            raise ValueError(f"q_stages and do_stages of {kernel.name} must be the same")
        self.dtype = symbolic.DTYPES[kernel.dtype]
        self.head_dim, self.head_dim_v = kernel.head_dim, kernel.head_dim_v
        # Every ring has as many stages, so one state says where a warp is in all of them.
        self.stages = kernel.q_stages
        self.consumer_registers = kernel.consumer_registers
        self.producer_registers = kernel.producer_registers
        self.varlen, self.biased = kernel.layout is Layout.VARLEN, kernel.mask is Mask.BIAS
        self.masks = key_masks_of(kernel)
        self.output_k, self.output_v = (
            Output(replace(kernel, head_dim_v=columns), self.dtype, ROWS, by_tma=False)
            for columns in (self.head_dim, self.head_dim_v)
        )

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        dout: cute.Tensor,
        lse: cute.Tensor,
        delta: cute.Tensor,
        dk: cute.Tensor,
        dv: cute.Tensor,
        scale: Float32,
        cu_seqlens_q: cute.Tensor | None,
        cu_seqlens_k: cute.Tensor | None,
        window_size_left: Int32,
        window_size_right: Int32,
        bias: cute.Tensor | None,
        lists: cute.Tensor | None,
        splits: Int32,
        stream: cuda.CUstream,
    ):
        offsets_q, offsets_k = None, None
        if const_expr(self.varlen):
            offsets_q = packed.Offsets(cu_seqlens_q, q.shape[0])
            offsets_k = packed.Offsets(cu_seqlens_k, k.shape[0])
        if const_expr(self.biased):
            splits = Int32(1)
        sizes = Sizes.of(q, k, offsets_k, ROWS, self.heads_together(q, k))
        if const_expr(self.varlen):
            q, k, v, dout = (packed.sequences(tensor) for tensor in (q, k, v, dout))
        q, k, v, dout = (
            staging.by_head(packed.assume_tensor_aligned(tensor)) for tensor in (q, k, v, dout)
        )
        dk, dv = (packed.assume_tensor_aligned(tensor) for tensor in (dk, dv))
        layout = staging.smem_layout(self.dtype, ROWS, self.head_dim, self.stages)
        layout_v = staging.smem_layout(self.dtype, ROWS, self.head_dim_v, self.stages)
        resident_k = staging.smem_layout(self.dtype, ROWS, self.head_dim, 1)
        resident_v = staging.smem_layout(self.dtype, ROWS, self.head_dim_v, 1)
        load = cpasync.CopyBulkTensorTileG2SOp()
        atom_q, tma_q = staging.tma(load, q, layout, ROWS, self.head_dim)
        atom_k, tma_k = staging.tma(load, k, resident_k, ROWS, self.head_dim)
        atom_v, tma_v = staging.tma(load, v, resident_v, ROWS, self.head_dim_v)
        atom_do, tma_do = staging.tma(load, dout, layout_v, ROWS, self.head_dim_v)
        mma_scores = sm90_utils.make_tiled_mma(self.dtype, "K", "K", ROWS)
        mma_dk = sm90_utils.make_tiled_mma(self.dtype, "K", "MN", self.head_dim, source="RS")
        mma_dv = sm90_utils.make_tiled_mma(self.dtype, "K", "MN", self.head_dim_v, source="RS")
        self.kernel(
            atom_q, tma_q, atom_k, tma_k, atom_v, tma_v, atom_do, tma_do, lse, delta, dk, dv,
            scale, offsets_q, offsets_k,
            visibility_of(window_size_left, window_size_right, bias, lists, scale), sizes, splits,
            layout, layout_v, resident_k, resident_v, mma_scores, mma_dk, mma_dv,
        ).launch(
            grid=[sizes.blocks * sizes.heads * splits, 1, 1], block=[3 * WARPGROUP, 1, 1],
            cluster=[splits, 1, 1], stream=stream, min_blocks_per_mp=1
        )  # fmt: skip

    def heads_together(self, q: cute.Tensor, k: cute.Tensor) -> Int32:
        """How many key/value heads have their key blocks worked on together."""
        if self.varlen or not self.masks.uneven:
            return Int32(1)
        bytes_of_row = (self.head_dim + self.head_dim_v) * self.dtype.width // 8
        rows_of_group = q.shape[-3] * (q.shape[-2] // k.shape[-2])
        return backward_parts.heads_in_l2(rows_of_group, bytes_of_row)

    def shared_storage(self, layout, layout_v, resident_k, resident_v, handover, statistics):
        rings = cute.struct.MemRange[cutlass.Int64, self.stages * 2]

        @cute.struct
        class Storage:
            q: staging.elements(self.dtype, layout)
            k: staging.elements(self.dtype, resident_k)
            v: staging.elements(self.dtype, resident_v)
            dout: staging.elements(self.dtype, layout_v)
            slots: cute.struct.Align[
                cute.struct.MemRange[Float16, cute.cosize(handover)], VECTOR_BYTES
            ]
            rows: cute.struct.Align[
                cute.struct.MemRange[Float32, cute.cosize(statistics)], VECTOR_BYTES
            ]
            barriers_q: rings
            barriers_k: cute.struct.MemRange[cutlass.Int64, 2]
            barriers_v: cute.struct.MemRange[cutlass.Int64, 2]
            barriers_do: rings
            barriers_handover: rings
            barriers_statistics: rings
            mask: cute.struct.Align[
                cute.struct.MemRange[self.dtype, self.masks.shared_elements()], VECTOR_BYTES
            ]
            barriers_mask: cute.struct.MemRange[cutlass.Int64, self.masks.shared_barriers()]

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
        lse: cute.Tensor,
        delta: cute.Tensor,
        dk: cute.Tensor,
        dv: cute.Tensor,
        scale: Float32,
        offsets_q: packed.Offsets | None,
        offsets_k: packed.Offsets | None,
        visibility: Visibility,
        sizes: Sizes,
        splits: Int32,  # CTAs of a cluster, which divide the query tiles of a key block
        layout: cute.ComposedLayout,
        layout_v: cute.ComposedLayout,
        resident_k: cute.ComposedLayout,
        resident_v: cute.ComposedLayout,
        mma_scores: cute.TiledMma,
        mma_dk: cute.TiledMma,
        mma_dv: cute.TiledMma,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for atom in (atom_q, atom_k, atom_v, atom_do):
                cpasync.prefetch_descriptor(atom)
        handover = cute.make_layout(
            ((HANDED, WEIGHTS // HANDED), WARPGROUP, self.stages),
            stride=((1, HANDED * WARPGROUP), HANDED, WEIGHTS * WARPGROUP),
        )
        statistics = backward_statistics.layout(self.stages)
        storage = SmemAllocator().allocate(
            self.shared_storage(layout, layout_v, resident_k, resident_v, handover, statistics)
        )
        both = 2 * WARPS
        pipeline_q = staging.tma_pipeline(self.dtype, storage.barriers_q, layout, self.stages, both)
        pipeline_k = staging.tma_pipeline(self.dtype, storage.barriers_k, resident_k, 1, WARPS)
        pipeline_v = staging.tma_pipeline(self.dtype, storage.barriers_v, resident_v, 1, WARPS)
        pipeline_do = staging.tma_pipeline(
            self.dtype, storage.barriers_do, layout_v, self.stages, both
        )
        pipeline_p = staging.warp_pipeline(storage.barriers_handover, self.stages, WARPS, WARPS)
        pipeline_rows = staging.warp_pipeline(storage.barriers_statistics, self.stages, 1, both)
        ring = self.masks.ring(storage.mask, storage.barriers_mask)
        pipeline.pipeline_init_arrive()
        sq = storage.q.get_tensor(layout.outer, swizzle=layout.inner)
        sk = storage.k.get_tensor(resident_k.outer, swizzle=resident_k.inner)
        sv = storage.v.get_tensor(resident_v.outer, swizzle=resident_v.inner)
        sdo = storage.dout.get_tensor(layout_v.outer, swizzle=layout_v.inner)
        loads = Loads(
            Load(atom_q, tma_q, sq, pipeline_q),
            Load(atom_k, tma_k, sk, pipeline_k),
            Load(atom_v, tma_v, sv, pipeline_v),
            Load(atom_do, tma_do, sdo, pipeline_do),
        )
        handover = Handover(storage.slots.get_tensor(handover), pipeline_p)
        rows = Statistics(lse, delta, storage.rows.get_tensor(statistics), pipeline_rows)
        if const_expr(self.varlen):
            packed.clear_outside(dk, offsets_k)
            packed.clear_outside(dv, offsets_k)
        tile = self.tile(sizes, splits, offsets_q, offsets_k, visibility)
        sums_v = self.shared_sums(storage.dout, self.head_dim_v)
        sums_k = self.shared_sums(storage.q, self.head_dim)
        pipeline.pipeline_init_wait()
        if tile.row < tile.keys:
            if warp < WARPS:
                cute.arch.setmaxregister_decrease(self.producer_registers)
                if warp == 0:
                    self.load(tile, visibility, loads)
                if warp == 1:
                    self.load_statistics(tile, visibility, rows)
                if const_expr(ring is not None) and warp >= WARPS - PARTS:
                    self.masks.load(tile, visibility, ring, warp - (WARPS - PARTS))
                if const_expr(not self.biased):  # noqa: SIM102, the other at run time
                    if splits > 1:
                        self.meet()
                        self.meet()
            else:
                cute.arch.setmaxregister_increase(self.consumer_registers)
                if warp < 2 * WARPS:
                    wg = self.warpgroup(
                        loads.k, loads.q, loads.dout, rows, handover, mma_scores, mma_dv
                    )
                    self.compute_dv(wg, tile, visibility, ring, scale * LOG2_E)
                    ours = Float32(2.0**-EXPONENT)
                    self.store(self.output_v, wg, tile, ours, splits, sums_v, dv)
                else:
                    wg = self.warpgroup(
                        loads.v, loads.dout, loads.q, rows, handover, mma_scores, mma_dk
                    )
                    self.compute_dk(wg, tile, visibility)
                    self.store(self.output_k, wg, tile, scale, splits, sums_k, dk)

    # What a CTA works on

    @cute.jit
    def tile(
        self, sizes: Sizes, splits: Int32, offsets_q, offsets_k, visibility: Visibility
    ) -> ClusterTile:
        cta, _, _ = cute.arch.block_idx()
        split, cta = cta % splits, cta // splits
        if const_expr(self.varlen):
            place = tile_slots.packed_place(cta, offsets_k, ROWS)
            head, index, batch = place.head, place.sequence, Int32(0)
            end_q, end_k = offsets_q[index + 1], offsets_k[index + 1]
            rows = cutlass.max(end_q - offsets_q[index], 0)
            keys = end_k - offsets_k[index] if place.tiles > 0 else 0
            row = place.tile * ROWS if place.tiles > 0 else 0
        else:
            place = backward_parts.dense_place(cta, sizes.blocks, sizes.heads, sizes.together)
            row = place.tile * ROWS
            batch, head = place.head // sizes.heads_kv, place.head % sizes.heads_kv
            rows, keys = sizes.rows, sizes.keys
            end_q, end_k = rows, keys
        begin, end, *free = self.masks.query_tiles(row, rows, keys, visibility)
        steps = sizes.ratio * (end - begin)
        share = cute.ceil_div(steps, splits)
        skipped = cutlass.min(split * share, steps)
        return ClusterTile(
            row, head, batch, rows, keys, end_q, end_k, begin, end, sizes.ratio, *free, skipped,
            cutlass.min(share, steps - skipped),
        )  # fmt: skip

    # The warps that load

    @cute.jit
    def load(self, tile: ClusterTile, visibility: Visibility, loads: Loads):
        """Loads the keys and values, and Q and dO of all query tiles."""
        steps = self.masks.steps(tile, visibility)
        if steps > 0:
            first = staging.producer_state(1, Int32(0))
            for once in (loads.k, loads.v):
                source = staging.rows_of(
                    once.source, tile.head, tile.batch, tile.keys, tile.end_k, self.varlen
                )
                staging.load_rows(once, source, tile.row, first)
            state = staging.producer_state(self.stages, Int32(0))
            step = self.masks.first(tile, visibility)
            for _ in cutlass.range(steps, unroll=1):
                row = self.masks.number(tile, step, visibility) * ROWS
                for streamed in (loads.q, loads.dout):
                    source = staging.rows_of(
                        streamed.source, tile.query_head(step.head), tile.batch, tile.rows,
                        tile.end_q, self.varlen,
                    )  # fmt: skip
                    staging.load_rows(streamed, source, row, state)
                state.advance()
                step = self.masks.following(tile, step, visibility)

    @cute.jit
    def load_statistics(self, tile: ClusterTile, visibility: Visibility, statistics: Statistics):
        """Brings lse and delta of all query tiles, with the powers of two that P's takes. A query
        that is none, or that sees no key, gets an lse of infinity: its P is zero."""
        state = staging.producer_state(self.stages, Int32(0))
        step = self.masks.first(tile, visibility)
        lane = cute.arch.lane_idx()
        for _ in cutlass.range(self.masks.steps(tile, visibility), unroll=1):
            row = self.masks.number(tile, step, visibility) * ROWS
            whose = tile.query_head(step.head), tile.batch, tile.end_q - tile.rows, self.varlen
            lse, delta = (
                staging.row_numbers(numbers, *whose)
                for numbers in (statistics.lse, statistics.delta)
            )
            backward_statistics.bring(
                statistics, lse, delta, row, tile.rows, lane, state,
                missing=-Float32.inf, taken=self.scaled,
            )  # fmt: skip
            state.advance()
            step = self.masks.following(tile, step, visibility)

    def scaled(self, lse: Float32, delta: Float32):
        """A query's logsumexp in base 2 and its delta, with the powers of two that P's takes."""
        return backward_parts.base_2(lse, self.biased) - EXPONENT, delta * 2.0**-EXPONENT

    # The warpgroups that compute

    def warpgroup(
        self,
        resident: Load,
        scored: Load,
        summed: Load,
        statistics: Statistics,
        handover: Handover,
        mma_scores: cute.TiledMma,
        mma_sums: cute.TiledMma,
    ) -> Warpgroup:
        thread, _, _ = cute.arch.thread_idx()
        _, frag_resident, frag_scored = sm90_utils.partition_fragment_ABC(
            mma_scores.get_slice(0),
            (ROWS, ROWS, cute.size(resident.stages, mode=[1])),
            resident.stages,
            scored.stages,
        )
        sums, weights, frag_summed = sm90_utils.partition_fragment_ABC(
            mma_sums.get_slice(0),
            (ROWS, cute.size(summed.stages, mode=[1]), ROWS),
            None,
            layout_utils.transpose_view(summed.stages),
        )
        sums.fill(0.0)
        scores = cute.make_rmem_tensor(mma_scores.partition_shape_C((ROWS, ROWS)), Float32)
        return Warpgroup(
            thread % WARPGROUP, resident, scored, summed, statistics, handover, mma_scores,
            mma_sums, frag_resident, frag_scored, frag_summed, weights, scores, sums,
        )  # fmt: skip

    @cute.jit
    def compute_dv(
        self, wg: Warpgroup, tile: ClusterTile, visibility: Visibility, ring, scale_log2: Float32
    ):
        """Computes P^T and dV."""
        bounds = self.masks.bounds(tile, visibility, wg.thread, wg.mma_scores, ring)
        edges = self.masks.edges
        steps = self.masks.steps(tile, visibility)
        if steps > 0:
            state, step = self.consumer_state(), self.masks.first(tile, visibility)
            self.first_scores(wg, state)
            lse = self.of_columns(wg, LSE, state)
            if const_expr(len(edges) > 1):  # noqa: SIM102, the other at run time
                if not self.masks.has(None, tile, step):
                    fetched = self.masks.fetch(step, bounds, edges[-1])
                    self.masks.mask(wg.scores, step, bounds, edges[-1], visibility, fetched)
            self.probabilities(wg, lse, scale_log2, state)
            self.convert(wg)
            for _ in cutlass.range(1, steps, unroll=1):
                before = state.clone()
                state.advance()
                step = self.masks.following(tile, step, visibility)
                at = Iteration(tile, step, visibility, bounds, before, state)
                self.step_dv(wg, at, scale_log2, edges)
                self.convert(wg)
            self.last_sums(wg, state)

    @cute.jit
    def step_dv(self, wg: Warpgroup, at: Iteration, scale_log2, edges: cutlass.Constexpr):
        """Computes P^T of a query tile, which has one of these edges, and dV of the one before."""
        # A branch between the issue of a product and the wait for it would make the compiler wait
        # at the branch, so each way has both.
        if const_expr(len(edges) == 1):
            self.issue(wg, at.before, at.state)
            lse = self.of_columns(wg, LSE, at.state)
            fetched = self.masks.fetch(at.step, at.bounds, edges[0])
            self.await_scores(wg, at.state)
            self.masks.mask(wg.scores, at.step, at.bounds, edges[0], at.visibility, fetched)
            self.probabilities(wg, lse, scale_log2, at.state)
            self.await_sums(wg, at.before)
        else:
            if self.masks.has(edges[0], at.tile, at.step):
                self.step_dv(wg, at, scale_log2, edges[:1])
            else:
                self.step_dv(wg, at, scale_log2, edges[1:])

    @cute.jit
    def compute_dk(self, wg: Warpgroup, tile: ClusterTile, visibility: Visibility):
        """Computes dS^T and dK."""
        steps = self.masks.steps(tile, visibility)
        if steps > 0:
            state = self.consumer_state()
            self.first_scores(wg, state)
            delta = self.of_columns(wg, DELTA, state)
            self.derivatives(wg, self.handed_over(wg, state), delta, state)
            self.convert(wg)
            for _ in cutlass.range(1, steps, unroll=1):
                before = state.clone()
                state.advance()
                self.issue(wg, before, state)
                delta = self.of_columns(wg, DELTA, state)
                handed = self.handed_over(wg, state)
                self.await_scores(wg, state)
                self.derivatives(wg, handed, delta, state)
                self.await_sums(wg, before)
                self.convert(wg)
            self.last_sums(wg, state)

    def consumer_state(self) -> PipelineStateSimple:
        return PipelineStateSimple(self.stages, Int32(0))

    def first_scores(self, wg: Warpgroup, state):
        """Computes the scores of the first query tile."""
        wg.resident.pipeline.consumer_wait(PipelineStateSimple(1, Int32(0)))
        wg.scored.pipeline.consumer_wait(state)
        self.issue_scores(wg, state)
        warpgroup.wait_group(0)
        wg.scored.pipeline.consumer_release(state)

    def issue(self, wg: Warpgroup, before, state):
        """Issues the scores of a query tile and the product of the tile before. What the pointwise
        part needs besides is read before the scores are there."""
        wg.summed.pipeline.consumer_wait(before)
        wg.scored.pipeline.consumer_wait(state)
        self.issue_scores(wg, state)
        self.issue_sums(wg, before)

    def await_scores(self, wg: Warpgroup, state):
        warpgroup.wait_group(1)
        wg.scored.pipeline.consumer_release(state)

    def await_sums(self, wg: Warpgroup, state):
        warpgroup.wait_group(0)
        wg.summed.pipeline.consumer_release(state)

    def last_sums(self, wg: Warpgroup, state):
        """Computes the product of the last query tile."""
        wg.summed.pipeline.consumer_wait(state)
        self.issue_sums(wg, state)
        warpgroup.wait_group(0)

    def issue_scores(self, wg: Warpgroup, state):
        resident = wg.frag_resident[None, None, None, 0]
        scored = wg.frag_scored[None, None, None, state.index]
        sm90_utils.gemm(wg.mma_scores, wg.scores, resident, scored, zero_init=True, wg_wait=-1)

    def issue_sums(self, wg: Warpgroup, state):
        summed = wg.frag_summed[None, None, None, state.index]
        sm90_utils.gemm(wg.mma_sums, wg.sums, wg.weights, summed, wg_wait=-1)

    def convert(self, wg: Warpgroup):
        utils.cvt_f16(layout_utils.reshape_acc_to_frgA(wg.scores), wg.weights)

    # The pointwise parts

    @cute.jit
    def probabilities(self, wg: Warpgroup, lse: cute.Tensor, scale_log2, state):
        """Replaces the scores by P^T times two to EXPONENT, and hands it over."""
        weights = layout_utils.reshape_acc_to_mn(wg.scores)
        for r in cutlass.range_constexpr(2):
            weights[r, None].store(
                cute.math.exp2(weights[r, None].load() * scale_log2 - lse.load(), fastmath=True)
            )
        handed = cute.make_rmem_tensor(WEIGHTS, Float16)
        utils.cvt_f16(self.exchanged(wg.scores), handed)
        slots = wg.handover.pipeline
        # A slot is empty at first, so who fills it waits for the other phase than who reads it.
        slots.producer_acquire_w_index_phase(state.index, state.phase ^ 1)
        slot = wg.handover.slots[None, wg.thread, state.index]
        cute.autovec_copy(cute.make_tensor(handed.iterator, cute.make_layout(slot.shape)), slot)
        slots.producer_commit(state)

    @cute.jit
    def handed_over(self, wg: Warpgroup, state) -> cute.Tensor:
        """P^T as the other warpgroup hands it over, in a tensor like the scores."""
        wg.handover.pipeline.consumer_wait(state)
        slot = wg.handover.slots[None, wg.thread, state.index]
        handed = cute.make_rmem_tensor_like(wg.scores, Float16)
        cute.autovec_copy(slot, cute.make_tensor(handed.iterator, cute.make_layout(slot.shape)))
        return self.exchanged(handed)

    def exchanged(self, weights: cute.Tensor) -> cute.Tensor:
        """A thread's scores, or as many values, with a column's two rows next to each other in
        place of a row's two columns. P^T is handed over in this order: the conversion of fp16
        weights would otherwise be the same as that of those handed over, and as it then stands
        before the wait for the product that reads the last weights, the compiler would compute one
        product at a time."""
        (columns, rows, _), *ones = weights.shape
        stride = ((rows, 1, rows * columns), *(0 for _ in ones))
        return cute.make_tensor(weights.iterator, cute.make_layout(weights.shape, stride=stride))

    @cute.jit
    def derivatives(self, wg: Warpgroup, handed: cute.Tensor, delta: cute.Tensor, state):
        """Replaces dP^T by dS^T = P^T (dP^T - delta)."""
        weights = layout_utils.reshape_acc_to_mn(wg.scores)
        probabilities = layout_utils.reshape_acc_to_mn(handed)
        for r in cutlass.range_constexpr(2):
            difference = weights[r, None].load() * 2.0**-EXPONENT - delta.load()
            weights[r, None].store(probabilities[r, None].load().to(Float32) * difference)
        index = state.index + backward_parts.zero_after_products(wg.scores)
        wg.handover.pipeline.consumer_release_w_index(index)

    @cute.jit
    def of_columns(self, wg: Warpgroup, which: cutlass.Constexpr, state) -> cute.Tensor:
        """A statistic of the queries of a thread's columns, in a tensor like a row's scores."""
        wg.statistics.pipeline.consumer_wait(state)
        found = cute.make_rmem_tensor_like(layout_utils.reshape_acc_to_mn(wg.scores)[0, None])
        backward_statistics.read(wg.statistics, which, wg.thread, state, found)
        wg.statistics.pipeline.consumer_release(state)
        return found

    # The end

    def shared_sums(self, room, columns: int) -> cute.Tensor:
        """The sums of a warpgroup's threads, in vectors: [of a vector, threads, vectors]. They take
        the room of two query tiles, once nothing of those is needed."""
        shape = (SUMS, WARPGROUP, ROWS * columns // (WARPGROUP * SUMS))
        pointer = cute.make_ptr(
            Float32, room.data_ptr().toint(), cute.AddressSpace.smem, assumed_align=VECTOR_BYTES
        )
        return cute.make_tensor(pointer, cute.make_layout(shape))

    @cute.jit
    def store(self, output: Output, wg: Warpgroup, tile: KeyTile, scale, splits, sums, gradient):
        """Stores dK or dV. The CTAs of a cluster divide its columns, and store the sums of all."""
        whole = const_expr(self.biased)
        if whole or splits == 1:
            store_gradient(output, tile, tile.row, wg.thread, wg.sums, scale, gradient)
        else:
            # Both warpgroups read the tiles whose room the sums take.
            cute.arch.barrier(barrier_id=STAGES_READ, number_of_threads=2 * WARPGROUP)
            vectors = cute.make_layout((SUMS, cute.size(sums, mode=[2])))
            cute.autovec_copy(
                cute.make_tensor(wg.sums.iterator, vectors), sums[None, wg.thread, None]
            )
            self.meet()
            self.store_columns(wg, tile, scale, splits, sums, gradient)
            self.meet()  # Until then other CTAs read the sums.

    def meet(self):
        """Waits for all threads of the cluster, and for what they stored."""
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    @cute.jit
    def store_columns(self, wg: Warpgroup, tile: KeyTile, scale, splits, sums, gradient):
        """Stores this CTA's columns of dK or dV: of every so many vectors of the sums, one."""
        target = staging.plain_rows(
            staging.by_head(gradient), tile.head, tile.batch, tile.end_k - tile.keys, self.varlen
        )
        lane = wg.thread % WARP
        row = tile.row + wg.thread // WARP * WARP_ROWS + lane // ROW_LANES
        split = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        for i in cutlass.range(split, cute.size(sums, mode=[2]), splits, unroll=1):
            ours = utils.elem_pointer(sums, (0, wg.thread, i))
            total = cute.make_rmem_tensor(SUMS, Float32)
            total.fill(0.0)
            for other in cutlass.range(splits, unroll=4):
                theirs = cute.make_tensor(
                    cute.arch.map_dsmem_ptr(ours, other), cute.make_layout(SUMS)
                )
                found = cute.make_rmem_tensor(SUMS, Float32)
                cute.autovec_copy(theirs, found)
                total.store(total.load() + found.load())
            result = cute.make_rmem_tensor(SUMS, self.dtype)
            result.store((total.load() * scale).to(self.dtype))
            words = cute.recast_tensor(result, Int32)
            column = ROW_LANES * PAIR * i + PAIR * (lane % ROW_LANES)
            for r in cutlass.range_constexpr(2):
                if row + 8 * r < tile.keys and column < cute.size(target, mode=[1]):
                    pointer = target.iterator + cute.crd2idx((row + 8 * r, column), target.layout)
                    where = cute.make_tensor(pointer.align(4), cute.make_layout(PAIR))
                    cute.recast_tensor(where, Int32)[0] = words[r]


def entry(kernel: Kernel):
    return BackwardKeys(kernel), symbolic.arguments(kernel)
