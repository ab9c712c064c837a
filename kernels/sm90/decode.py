"""The SM90 forward of few queries, as in decoding: a kernel of our own.

A step of decoding reads all keys and values for a handful of query rows, so its time is that of
reading them. Two things follow. The query heads that share a key/value head (GQA, MQA) are rows of
one tile, which reads the keys once for all of them. And the keys of one head are split over the
CTAs of a cluster, so that a small batch still keeps many SMs loading. The CTAs leave their
normalised outputs and logsumexps in shared memory and combine them across the cluster, in a fixed
order, with no workspace and no second kernel.

Mask, lengths, paging, ratio of heads and number of splits are run-time values, so there is one
object for each dtype and bucket.
"""

import math
from functools import partial
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import SmemAllocator
from flash_attn.cute import utils
from flash_attn.cute.cute_dsl_utils import assume_tensor_aligned
from flash_attn.cute.softmax import Softmax
from quack import copy_utils, layout_utils, sm90_utils

from kernels.common import packed, symbolic
from kernels.kernel import Kernel
from kernels.sm90 import staging
from kernels.sm90.barriers import Barrier
from kernels.sm90.staging import Load
from kernels.sm90.window import Window

CONSUMERS = 128  # threads: one warpgroup
CONSUMER_WARPS = CONSUMERS // 32
THREADS = CONSUMERS + 32  # and a warp that loads
VECTOR = 8  # elements of 2 bytes in 16 bytes
MAX_SPLITS = 16  # CTAs in a cluster, at most, on Hopper
OUTPUT_VECTOR = 4  # fp32 elements in 16 bytes
# fp32 elements of padding per row of the partial outputs, so that rows stored together lie in
# different banks
PAD = 8
LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """What a CTA works on. Rows are pairs of query and head, the heads of a group next to
    each other."""

    batch: Int32
    # index into the batch mode of q, k, v and o; 0 when varlen, whose tensors have a batch of one
    entry: Int32
    head_kv: Int32
    ratio: Int32  # query heads of a key/value head
    first_row: Int32
    rows: Int32  # 0 or less where a sequence has fewer queries than the longest
    offset_q: Int32  # varlen: the sequence's first row in q
    offset_k: Int32
    seqlen_k: Int32
    shift: Int32  # of the diagonal, bottom-right aligned: keys minus queries
    begin: Int32  # key blocks, [begin, end)
    end: Int32


class Lengths(NamedTuple):
    """Where the sequences are. What is not given has no elements."""

    cu_seqlens_q: cute.Tensor
    cu_seqlens_k: cute.Tensor
    seqused_k: cute.Tensor
    block_table: cute.Tensor


class KeyBounds(NamedTuple):
    """Which keys the rows of a thread's scores see."""

    where: cute.Tensor  # each score's row and column in the tile
    first: cute.Tensor  # each row's keys, [first, end)
    end: cute.Tensor
    all_first: Int32  # [all_first, all_end): the keys that every row of the tile sees
    all_end: Int32


@cute.jit
def sequence(batch: Int32, cu_seqlens: cute.Tensor, rows: Int32):
    """The first row and the length of a sequence in a tensor of `rows`. `cu_seqlens` of a dense
    tensor has no elements."""
    offset, length = Int32(0), rows
    if cute.size(cu_seqlens) > 0:
        offsets = packed.Offsets(cu_seqlens, rows)
        offset = offsets[batch]
        length = cutlass.max(offsets[batch + 1] - offset, 0)
    return offset, length


class Decode:
    def __init__(self, kernel: Kernel):
        self.dtype = symbolic.DTYPES[kernel.dtype]
        self.tile_m, self.tile_n = kernel.block_m, kernel.block_n
        self.head_dim, self.head_dim_v = kernel.head_dim, kernel.head_dim_v
        self.stages = kernel.stages
        self.ctas_per_sm = kernel.ctas_per_sm

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        o: cute.Tensor,
        lse: cute.Tensor,
        scale: Float32,
        cu_seqlens_q: cute.Tensor,
        cu_seqlens_k: cute.Tensor,
        seqused_k: cute.Tensor,
        block_table: cute.Tensor,
        window_size_left: Int32,
        window_size_right: Int32,
        max_seqlen_q: Int32,
        splits: Int32,
        stream: cuda.CUstream,
    ):
        q, k, v, o = (assume_tensor_aligned(tensor) for tensor in (q, k, v, o))
        by_head = [1, 3, 2, 0]  # [seqlen, head_dim, heads, batch or pages]
        sq_layout = staging.smem_layout(self.dtype, self.tile_m, self.head_dim, None)
        sk_layout = staging.smem_layout(self.dtype, self.tile_n, self.head_dim, self.stages)
        sv_layout = staging.smem_layout(self.dtype, self.tile_n, self.head_dim_v, self.stages)
        load = cpasync.CopyBulkTensorTileG2SOp()
        load_k, tma_k = staging.tma(
            load, layout_utils.select(k, by_head), sk_layout, self.tile_n, self.head_dim
        )
        load_v, tma_v = staging.tma(
            load, layout_utils.select(v, by_head), sv_layout, self.tile_n, self.head_dim_v
        )
        mma_qk = sm90_utils.make_tiled_mma(self.dtype, "K", "K", self.tile_n)
        mma_pv = sm90_utils.make_tiled_mma(self.dtype, "K", "MN", self.head_dim_v, source="RS")
        batch = cute.size(q, mode=[0])
        if cute.size(cu_seqlens_q) > 0:
            batch = cute.size(cu_seqlens_q) - 1
        heads_kv = cute.size(k, mode=[2])
        tiles = cute.ceil_div(max_seqlen_q * (cute.size(q, mode=[2]) // heads_kv), self.tile_m)
        self.kernel(
            q, o, lse, load_k, tma_k, load_v, tma_v, scale * LOG2_E, cu_seqlens_q, cu_seqlens_k,
            seqused_k, block_table,
            window_size_left, window_size_right, tiles, sq_layout, sk_layout, sv_layout, mma_qk,
            mma_pv,
        ).launch(
            grid=[splits, heads_kv * tiles, batch], block=[THREADS, 1, 1], cluster=[splits, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.ctas_per_sm, preferred_smem_carveout=100,
        )  # fmt: skip

    def shared_storage(self, sq_layout, sk_layout, sv_layout):
        @cute.struct
        class Storage:
            q: staging.elements(self.dtype, sq_layout)
            k: staging.elements(self.dtype, sk_layout)
            v: staging.elements(self.dtype, sv_layout)
            barriers_k: cute.struct.MemRange[cutlass.Int64, self.stages * 2]
            barriers_v: cute.struct.MemRange[cutlass.Int64, self.stages * 2]

        return Storage

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        o: cute.Tensor,
        lse: cute.Tensor,
        load_k: cute.CopyAtom,
        tma_k: cute.Tensor,
        load_v: cute.CopyAtom,
        tma_v: cute.Tensor,
        scale_log2: Float32,
        cu_seqlens_q: cute.Tensor,
        cu_seqlens_k: cute.Tensor,
        seqused_k: cute.Tensor,
        block_table: cute.Tensor,
        window_size_left: Int32,
        window_size_right: Int32,
        tiles: Int32,
        sq_layout: cute.ComposedLayout,
        sk_layout: cute.ComposedLayout,
        sv_layout: cute.ComposedLayout,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == CONSUMER_WARPS:
            cpasync.prefetch_descriptor(load_k)
            cpasync.prefetch_descriptor(load_v)
        storage = SmemAllocator().allocate(self.shared_storage(sq_layout, sk_layout, sv_layout))
        pipeline_k = staging.tma_pipeline(
            self.dtype, storage.barriers_k, sk_layout, self.stages, CONSUMER_WARPS
        )
        pipeline_v = staging.tma_pipeline(
            self.dtype, storage.barriers_v, sv_layout, self.stages, CONSUMER_WARPS
        )
        pipeline.pipeline_init_arrive()
        sq = storage.q.get_tensor(sq_layout.outer, swizzle=sq_layout.inner)
        sk = storage.k.get_tensor(sk_layout.outer, swizzle=sk_layout.inner)
        sv = storage.v.get_tensor(sv_layout.outer, swizzle=sv_layout.inner)
        # When all keys have been read, the results take the place of Q and K.
        output_layout = cute.make_layout(
            (self.tile_m, self.head_dim_v), stride=(self.head_dim_v + PAD, 1)
        )
        weights_layout = cute.make_layout((1 + MAX_SPLITS, self.tile_m), stride=(self.tile_m, 1))
        assert 4 * cute.cosize(output_layout) <= 2 * cute.cosize(sk_layout)
        assert 4 * cute.cosize(weights_layout) <= 2 * cute.cosize(sq_layout)
        output = cute.make_tensor(
            cute.recast_ptr(storage.k.data_ptr(), dtype=Float32), output_layout
        )
        weights = cute.make_tensor(
            cute.recast_ptr(storage.q.data_ptr(), dtype=Float32), weights_layout
        )
        # Row 0 is this CTA's logsumexp, the other rows are the weights of all CTAs.
        row_lse, weights = weights[0, None], cute.domain_offset((1, 0), weights)
        k, v = Load(load_k, tma_k, sk, pipeline_k), Load(load_v, tma_v, sv, pipeline_v)
        window = Window(window_size_left, window_size_right)
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
        tile = self.tile(q, tma_k, lengths, window, tiles)
        pipeline.pipeline_init_wait()
        if warp == CONSUMER_WARPS:
            self.load(tile, k, v, block_table)
        else:
            self.attend(tile, window, q, sq, k, v, mma_qk, mma_pv, scale_log2, output, row_lse)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        if warp < CONSUMER_WARPS:
            self.combine(tile, output, row_lse, weights, o, lse)
        cute.arch.cluster_arrive()  # a CTA's shared memory is there until all have read it
        cute.arch.cluster_wait()

    @cute.jit
    def tile(self, q, tma_k, lengths: Lengths, window: Window, tiles) -> Tile:
        cu_seqlens_q, cu_seqlens_k, seqused_k, block_table = lengths
        _, y, batch = cute.arch.block_idx()
        split, _, _ = cute.arch.block_in_cluster_idx()
        splits, _, _ = cute.arch.block_in_cluster_dim()
        head_kv = y // tiles
        ratio = cute.size(q, mode=[2]) // cute.size(tma_k, mode=[2])
        offset_q, seqlen_q = sequence(batch, cu_seqlens_q, cute.size(q, mode=[1]))
        offset_k, seqlen_k = Int32(0), cute.size(tma_k, mode=[0])
        # With pages, cu_seqlens_k gives the number of keys, not their position.
        if cute.size(block_table, mode=[0]) > 0:
            seqlen_k *= cute.size(block_table, mode=[1])
            if cute.size(cu_seqlens_k) > 0:
                seqlen_k = packed.clamp(cu_seqlens_k[batch + 1] - cu_seqlens_k[batch], seqlen_k)
        else:
            offset_k, seqlen_k = sequence(batch, cu_seqlens_k, seqlen_k)
        if cute.size(seqused_k) > 0:
            seqlen_k = packed.clamp(seqused_k[batch], seqlen_k)
        first_row = (y - head_kv * tiles) * self.tile_m
        rows = cutlass.min(seqlen_q * ratio - first_row, self.tile_m)
        entry = batch
        if cute.size(cu_seqlens_q) > 0:
            entry = Int32(0)
        shift = seqlen_k - seqlen_q
        last_key = cutlass.min((first_row + rows - 1) // ratio + shift + window.right, seqlen_k - 1)
        first_key = cutlass.max(first_row // ratio + shift - window.left, 0)
        first = first_key // self.tile_n
        blocks = cutlass.max((last_key + self.tile_n) // self.tile_n - first, 0)
        if rows <= 0 or last_key < 0:
            blocks = 0
        share = cute.ceil_div(blocks, splits)
        begin = first + cutlass.min(split * share, blocks)
        end = first + cutlass.min((split + 1) * share, blocks)
        return Tile(
            batch,
            entry,
            head_kv,
            ratio,
            first_row,
            rows,
            offset_q,
            offset_k,
            seqlen_k,
            shift,
            begin,
            end,
        )

    @cute.jit
    def load(self, tile: Tile, k: Load, v: Load, block_table):
        """Loads the keys and values of the CTA's share, a key block at a time."""
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        page_size = cute.size(k.source, mode=[0])
        for block in cutlass.range(tile.begin, tile.end, unroll=1):
            row, page = tile.offset_k + block * self.tile_n, tile.entry
            if cute.size(block_table, mode=[0]) > 0:
                index = block * self.tile_n // page_size
                row, page = block * self.tile_n - index * page_size, block_table[tile.batch, index]
            self.load_block(tile, k, state, row, page, self.head_dim)
            self.load_block(tile, v, state, row, page, self.head_dim_v)
            state.advance()

    @cute.jit
    def load_block(self, tile: Tile, load: Load, state, row, page, columns: cutlass.Constexpr):
        head = cute.domain_offset((row, 0), load.source[None, None, tile.head_kv, page])
        block = cute.local_tile(head, (self.tile_n, columns), (0, 0))
        stage = load.stages[None, None, state.index]
        copy, _, _ = copy_utils.tma_get_copy_fn(
            load.atom, 0, cute.make_layout(1), block, stage, single_stage=True
        )
        load.pipeline.producer_acquire(state)
        copy(tma_bar_ptr=load.pipeline.producer_get_barrier(state))
        load.pipeline.producer_commit(state)

    @cute.jit
    def load_q(self, tile, q, sq, thr_copy):
        """Gathers the rows of a tile. Columns beyond head_dim become zero, rows beyond the tile's
        are not written."""
        to_shared = thr_copy.partition_D(sq)
        where = thr_copy.partition_S(cute.make_identity_tensor((self.tile_m, self.head_dim)))
        for i in cutlass.range_constexpr(cute.size(to_shared, mode=[1])):
            row = where[0, i, 0][0]
            if row < tile.rows:
                query, head = self.query_and_head(tile, row)
                for j in cutlass.range_constexpr(cute.size(to_shared, mode=[2])):
                    column = where[0, 0, j][1]
                    vector = cute.make_rmem_tensor_like(to_shared[None, i, j])
                    vector.fill(0.0)
                    if column < cute.size(q, mode=[3]):
                        source = utils.elem_pointer(
                            q, (tile.entry, tile.offset_q + query, head, column)
                        ).toint()
                        pointer = cute.make_ptr(
                            self.dtype, source, cute.AddressSpace.gmem, assumed_align=16
                        )
                        cute.autovec_copy(
                            cute.make_tensor(pointer, cute.make_layout(VECTOR)),
                            cute.make_tensor(vector.iterator, cute.make_layout(VECTOR)),
                        )
                    cute.copy(thr_copy, vector, to_shared[None, i, j])

    @cute.jit
    def attend(
        self,
        tile: Tile,
        window: Window,
        q,
        sq,
        k: Load,
        v: Load,
        mma_qk,
        mma_pv,
        scale_log2,
        output,
        row_lse,
    ):
        """Computes the attention of the tile's rows to the CTA's share of the keys, into `output`
        and `row_lse`."""
        tidx, _, _ = cute.arch.thread_idx()
        thr_copy = self.vector_copy(self.head_dim).get_slice(tidx)
        self.load_q(tile, q, sq, thr_copy)
        cute.arch.fence_view_async_shared()
        self.sync_consumers()

        warpgroup_qk, warpgroup_pv = mma_qk.get_slice(0), mma_pv.get_slice(0)
        _, frag_q, frag_k = sm90_utils.partition_fragment_ABC(
            warpgroup_qk, (self.tile_m, self.tile_n, self.head_dim), sq, k.stages
        )
        acc_o, frag_p, frag_v = sm90_utils.partition_fragment_ABC(
            warpgroup_pv,
            (self.tile_m, self.head_dim_v, self.tile_n),
            None,
            layout_utils.transpose_view(v.stages),
        )
        acc_o.fill(0.0)
        bounds = self.key_bounds(tile, mma_qk.get_slice(tidx), window)
        softmax = Softmax.create(scale_log2, num_rows=cute.size(bounds.where, mode=[0]))
        softmax.reset()

        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        qk = partial(sm90_utils.gemm_zero_init, mma_qk, (self.tile_m, self.tile_n), frag_q, frag_k)
        pv = partial(sm90_utils.gemm_w_idx, mma_pv, acc_o, frag_p, frag_v, zero_init=False)
        if tile.begin < tile.end:
            k.pipeline.consumer_wait(state, k.pipeline.consumer_try_wait(state))
            acc_s = qk(B_idx=state.index, wg_wait=0)
            k.pipeline.consumer_release(state)
            self.mask(acc_s, tile.begin * self.tile_n, bounds)
            softmax.online_softmax(acc_s)
            utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_s), frag_p)
        # During a key block's softmax the tensor cores work on the values of the one before.
        for block in cutlass.range(tile.begin + 1, tile.end, unroll=1):
            state_v = state.clone()
            state.advance()
            k.pipeline.consumer_wait(state, k.pipeline.consumer_try_wait(state))
            acc_s = qk(B_idx=state.index)
            v.pipeline.consumer_wait(state_v, v.pipeline.consumer_try_wait(state_v))
            pv(B_idx=state_v.index)
            warpgroup.wait_group(1)
            k.pipeline.consumer_release(state)
            self.mask(acc_s, block * self.tile_n, bounds)
            row_scale = softmax.online_softmax(acc_s)
            warpgroup.wait_group(0)
            v.pipeline.consumer_release(state_v)
            utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_s), frag_p)
            softmax.rescale_O(acc_o, row_scale)
        if tile.begin < tile.end:
            v.pipeline.consumer_wait(state, v.pipeline.consumer_try_wait(state))
            if tile.end * self.tile_n > tile.seqlen_k:
                self.clear_rows(
                    v.stages[None, None, state.index],
                    tile.seqlen_k - (tile.end - 1) * self.tile_n,
                    tidx,
                )
            pv(B_idx=state.index, wg_wait=0)

        softmax.rescale_O(acc_o, softmax.finalize())
        self.sync_consumers()  # no warp reads keys or values any more
        outputs = layout_utils.reshape_acc_to_mn(acc_o)
        where_o = layout_utils.reshape_acc_to_mn(
            mma_pv.get_slice(tidx).partition_C(
                cute.make_identity_tensor((self.tile_m, self.head_dim_v))
            )
        )
        for r in cutlass.range_constexpr(cute.size(outputs, mode=[0])):
            row = where_o[r, 0][0]
            if row < tile.rows:
                for c in cutlass.range_constexpr(cute.size(outputs, mode=[1])):
                    output[row, where_o[r, c][1]] = outputs[r, c]
                if where_o[r, 0][1] == 0:
                    row_lse[row] = softmax.row_sum[r]

    @cute.jit
    def key_bounds(self, tile: Tile, thr_mma, window: Window) -> KeyBounds:
        where = layout_utils.reshape_acc_to_mn(
            thr_mma.partition_C(cute.make_identity_tensor((self.tile_m, self.tile_n)))
        )
        first, end = (cute.make_rmem_tensor(cute.size(where, mode=[0]), Int32) for _ in range(2))
        for r in cutlass.range_constexpr(cute.size(where, mode=[0])):
            diagonal = (tile.first_row + where[r, 0][0]) // tile.ratio + tile.shift
            first[r] = diagonal - window.left
            end[r] = cutlass.min(diagonal + window.right + 1, tile.seqlen_k)
        all_first = (tile.first_row + tile.rows - 1) // tile.ratio + tile.shift - window.left
        all_end = cutlass.min(
            tile.first_row // tile.ratio + tile.shift + window.right + 1, tile.seqlen_k
        )
        return KeyBounds(where, first, end, all_first, all_end)

    @cute.jit
    def mask(self, acc_s, key: Int32, bounds: KeyBounds):
        if key < bounds.all_first or key + self.tile_n > bounds.all_end:
            scores = layout_utils.reshape_acc_to_mn(acc_s)
            for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
                for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                    column = key + bounds.where[r, c][1]
                    seen = column >= bounds.first[r] and column < bounds.end[r]
                    scores[r, c] = scores[r, c] if seen else -Float32.inf

    def vector_copy(self, columns: int) -> cute.TiledCopy:
        return copy_utils.tiled_copy_2d(
            self.dtype, math.gcd(columns // VECTOR, VECTOR), CONSUMERS, VECTOR
        )

    def sync_consumers(self):
        cute.arch.barrier(barrier_id=Barrier.WARPGROUP_1, number_of_threads=CONSUMERS)

    @cute.jit
    def clear_rows(self, sv: cute.Tensor, first: Int32, tidx: Int32):
        """Clears the rows that are no values of the sequence: they may hold anything, and 0 * NaN
        is NaN."""
        thr_copy = self.vector_copy(self.head_dim_v).get_slice(tidx)
        to_shared = thr_copy.partition_D(sv)
        where = thr_copy.partition_S(cute.make_identity_tensor((self.tile_n, self.head_dim_v)))
        zeros = cute.make_rmem_tensor_like(to_shared[None, 0, None])
        zeros.fill(0.0)
        for i in cutlass.range_constexpr(cute.size(to_shared, mode=[1])):
            if where[0, i, 0][0] >= first:
                cute.copy(thr_copy, zeros, to_shared[None, i, None])
        cute.arch.fence_view_async_shared()
        self.sync_consumers()

    @cute.jit
    def combine(self, tile, output, row_lse, weights, o, lse):
        """Combines the cluster's outputs. Each CTA writes its share of the tile."""
        tidx, _, _ = cute.arch.thread_idx()
        split, _, _ = cute.arch.block_in_cluster_idx()
        splits, _, _ = cute.arch.block_in_cluster_dim()
        # A load from another CTA has a long latency, so all of them are issued at once.
        for i in cutlass.range(tidx, splits * tile.rows, CONSUMERS):
            weights[i // tile.rows, i % tile.rows] = self.remote(
                row_lse, i % tile.rows, i // tile.rows
            )[0]
        self.sync_consumers()
        if tidx < tile.rows:
            largest = -Float32.inf
            for s in cutlass.range(splits):
                largest = cute.arch.fmax(largest, weights[s, tidx])
            if largest == -Float32.inf:
                largest = Float32(0.0)
            total = Float32(0.0)
            for s in cutlass.range(splits):
                weight = cute.math.exp2((weights[s, tidx] - largest) * LOG2_E, fastmath=True)
                weights[s, tidx] = weight
                total += weight
            inverse = 1.0 / total if total > 0.0 else Float32(0.0)
            for s in cutlass.range(splits):
                weights[s, tidx] = weights[s, tidx] * inverse
            if split == 0:
                query, head = self.query_and_head(tile, tidx)
                lse[tile.entry, head, tile.offset_q + query] = (
                    largest + cute.math.log(total) if total > 0.0 else -Float32.inf
                )
        self.sync_consumers()
        vectors = cute.size(o, mode=[3]) // OUTPUT_VECTOR
        for i in cutlass.range(split * CONSUMERS + tidx, tile.rows * vectors, splits * CONSUMERS):
            row = i // vectors
            column = (i - row * vectors) * OUTPUT_VECTOR
            total = cute.make_rmem_tensor(OUTPUT_VECTOR, Float32)
            total.fill(0.0)
            for s in cutlass.range(splits, unroll=4):
                total.store(
                    total.load()
                    + self.remote(output, (row, column), s, OUTPUT_VECTOR).load() * weights[s, row]
                )
            result = cute.make_rmem_tensor(OUTPUT_VECTOR, self.dtype)
            result.store(total.load().to(self.dtype))
            query, head = self.query_and_head(tile, row)
            target = utils.elem_pointer(
                o, (tile.entry, tile.offset_q + query, head, column)
            ).toint()
            pointer = cute.make_ptr(
                self.dtype, target, cute.AddressSpace.gmem, assumed_align=2 * OUTPUT_VECTOR
            )
            cute.autovec_copy(result, cute.make_tensor(pointer, cute.make_layout(OUTPUT_VECTOR)))

    @cute.jit
    def query_and_head(self, tile, row: Int32):
        query = (tile.first_row + row) // tile.ratio
        return query, tile.head_kv * tile.ratio + tile.first_row + row - query * tile.ratio

    @cute.jit
    def remote(self, tensor, coordinate, split, count: cutlass.Constexpr = 1):
        """`count` elements of another CTA's tensor in shared memory."""
        pointer = cute.arch.map_dsmem_ptr(utils.elem_pointer(tensor, coordinate), split)
        found = cute.make_rmem_tensor(count, tensor.element_type)
        cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(count)), found)
        return found


def entry(kernel: Kernel):
    return Decode(kernel), symbolic.arguments(kernel)
