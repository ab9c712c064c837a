"""The SM90 forward of few queries, as in decoding: a kernel of our own.

A step of decoding reads all keys and values for a handful of query rows, so its time is that of
reading them. Two things follow. The query heads that share a key/value head (GQA, MQA) are rows of
one tile, which reads the keys once for all of them. And the keys of one head are split over the
CTAs of a cluster, so that a small batch still keeps many SMs loading. The CTAs leave their
normalised outputs and logsumexps in shared memory and combine them across the cluster, in a fixed
order, with no workspace and no second kernel.

The products are transposed: S^T = K Q^T and O^T += V^T P^T. WGMMA has 64 rows at least, which the
keys and the columns of V fill, but as few as 8 columns, so that few rows of queries cost few
exponentials and registers.

Mask, lengths, paging, ratio of heads and number of splits are run-time values, so there is one
object for each dtype, bucket and number of rows.
"""

import math
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import SmemAllocator
from flash_attn.cute import utils
from flash_attn.cute.cute_dsl_utils import assume_tensor_aligned
from quack import copy_utils, layout_utils, sm90_utils

from kernels.common import packed, symbolic
from kernels.common.pages import Table
from kernels.kernel import Kernel
from kernels.sm90 import columns, staging
from kernels.sm90.columns import Softmax
from kernels.sm90.pages import Boxes, Pages
from kernels.sm90.softmax import LOG2_E
from kernels.sm90.staging import Load
from kernels.sm90.window import Window

CONSUMERS = columns.THREADS  # one warpgroup
CONSUMER_WARPS = columns.WARPS
THREADS = CONSUMERS + 32  # and a warp that loads
PRODUCT_ROWS = 64  # WGMMA's M
# Tiles of P^T in shared memory: one is written while the tensor cores read the other.
WEIGHTS_STAGES = 2
MAX_SPLITS = 16  # CTAs in a cluster, at most, on Hopper
ROWS_WEIGHED = CONSUMERS // MAX_SPLITS  # at a time: a thread has one row of one CTA
OUTPUT_VECTOR = 4  # fp32 elements in 16 bytes
# fp32 elements of padding per row of the partial outputs: a warp stores 8 neighbours of every
# second one of 8 rows, which then lie in different banks.
PAD = 4
LN_2 = math.log(2)


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
    """Which keys the rows of the tile see."""

    each: cute.Tensor  # in shared memory: each row's, [first, end)
    all_first: Int32  # [all_first, all_end): the keys that every row sees
    all_end: Int32


class Shared(NamedTuple):
    """What is in shared memory beside the keys and values."""

    q: cute.Tensor
    weights: cute.Tensor  # stages of P, [rows, keys]
    numbers: cute.Tensor  # Softmax.shared
    bounds: cute.Tensor  # KeyBounds.each


class Products(NamedTuple):
    """The tensor cores' operands and accumulators."""

    mma_qk: cute.TiledMma
    mma_pv: cute.TiledMma
    q: cute.Tensor
    k: cute.Tensor
    weights: cute.Tensor
    v: cute.Tensor
    scores: cute.Tensor  # S^T of a key block
    outputs: cute.Tensor  # O^T


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


@cute.jit
def reciprocal(total: Float32) -> Float32:
    """The reciprocal of a sum of weights, 0 where there are none."""
    return cute.arch.rcp_approx(total) if total > 0.0 else Float32(0.0)


@cute.jit
def logarithm(reference_log2: Float32, total: Float32) -> Float32:
    """The natural logarithm of a sum of weights, which were divided by 2^reference_log2."""
    return (
        (reference_log2 + cute.math.log2(total, fastmath=True)) * LN_2
        if total > 0.0
        else -Float32.inf
    )


class Decode:
    def __init__(self, kernel: Kernel):
        self.dtype = symbolic.DTYPES[kernel.dtype]
        self.tile_m, self.tile_n = kernel.block_m, kernel.block_n
        self.head_dim, self.head_dim_v = kernel.head_dim, kernel.head_dim_v
        self.stages = kernel.stages
        self.ctas_per_sm = kernel.ctas_per_sm
        # The columns of V that a product begins at. Where they are no multiple of 64 the products
        # overlap, and compute some columns of O twice.
        self.pages = Pages(self.dtype, self.tile_n, large=False)
        self.product_step = math.gcd(self.head_dim_v, PRODUCT_ROWS)
        self.products_v = (self.head_dim_v - PRODUCT_ROWS) // self.product_step + 1

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
        k_by_head, v_by_head = staging.by_head(k), staging.by_head(v)
        sq_layout = staging.smem_layout(self.dtype, self.tile_m, self.head_dim, None)
        sk_layout = staging.smem_layout(self.dtype, self.tile_n, self.head_dim, self.stages)
        sv_layout = staging.smem_layout(self.dtype, self.tile_n, self.head_dim_v, self.stages)
        load = cpasync.CopyBulkTensorTileG2SOp()
        load_k, tma_k = staging.tma(load, k_by_head, sk_layout, self.tile_n, self.head_dim)
        load_v, tma_v = staging.tma(load, v_by_head, sv_layout, self.tile_n, self.head_dim_v)
        (small_k,) = self.pages.tma(load, k_by_head, self.head_dim)
        (small_v,) = self.pages.tma(load, v_by_head, self.head_dim_v)
        sp_layout = staging.smem_layout(self.dtype, self.tile_m, self.tile_n, WEIGHTS_STAGES)
        mma_qk, mma_pv = self.tiled_mmas()
        batch = cute.size(q, mode=[0])
        if cute.size(cu_seqlens_q) > 0:
            batch = cute.size(cu_seqlens_q) - 1
        heads_kv = cute.size(k, mode=[2])
        tiles = cute.ceil_div(max_seqlen_q * (cute.size(q, mode=[2]) // heads_kv), self.tile_m)
        self.kernel(
            q, o, lse, load_k, tma_k, load_v, tma_v, small_k, small_v, scale * LOG2_E,
            cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
            window_size_left, window_size_right, tiles, sq_layout, sk_layout, sv_layout, sp_layout,
            mma_qk, mma_pv,
        ).launch(
            grid=[splits, heads_kv * tiles, batch], block=[THREADS, 1, 1], cluster=[splits, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.ctas_per_sm, preferred_smem_carveout=100,
        )  # fmt: skip

    def shared_storage(self, sq_layout, sk_layout, sv_layout, sp_layout):
        @cute.struct
        class Storage:
            q: staging.elements(self.dtype, sq_layout)
            k: staging.elements(self.dtype, sk_layout)
            v: staging.elements(self.dtype, sv_layout)
            weights: staging.elements(self.dtype, sp_layout)
            numbers: cute.struct.MemRange[Float32, CONSUMER_WARPS * self.tile_m]
            bounds: cute.struct.MemRange[Int32, 2 * self.tile_m]
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
        small_k: tuple,  # a TMA atom and tensor for small boxes
        small_v: tuple,
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
        sp_layout: cute.ComposedLayout,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == CONSUMER_WARPS:
            cpasync.prefetch_descriptor(load_k)
            cpasync.prefetch_descriptor(load_v)
        storage = SmemAllocator().allocate(
            self.shared_storage(sq_layout, sk_layout, sv_layout, sp_layout)
        )
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
        shared = Shared(
            sq,
            storage.weights.get_tensor(sp_layout.outer, swizzle=sp_layout.inner),
            storage.numbers.get_tensor(
                cute.make_layout((CONSUMER_WARPS, self.tile_m), stride=(self.tile_m, 1))
            ),
            storage.bounds.get_tensor(cute.make_layout((self.tile_m, 2), stride=(2, 1))),
        )
        # When all keys have been read, the results take the place of Q and of K and V.
        output_layout = cute.make_layout(
            (self.tile_m, self.head_dim_v), stride=(self.head_dim_v + PAD, 1)
        )
        weights_layout = cute.make_layout((1 + MAX_SPLITS, self.tile_m), stride=(self.tile_m, 1))
        assert 4 * cute.cosize(output_layout) <= 2 * (
            cute.cosize(sk_layout) + cute.cosize(sv_layout)
        )
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
            page_size = cute.size(tma_k, mode=[0])
            if cute.size(block_table, mode=[0]) > 0 and page_size % self.tile_n != 0:
                table = Table(block_table, cu_seqlens_k, seqused_k, page_size)
                self.load_in_boxes(tile, Boxes(k, (small_k,)), Boxes(v, (small_v,)), table)
            else:
                self.load(tile, k, v, block_table)
        else:
            self.attend(tile, window, q, shared, k, v, mma_qk, mma_pv, scale_log2, output, row_lse)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        if warp < CONSUMER_WARPS:
            self.combine(tile, output, row_lse, weights, o, lse)
        # A CTA's shared memory is there until all have read it. No writes are waited for.
        cute.arch.cluster_arrive_relaxed()
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
    def load_in_boxes(self, tile: Tile, k: Boxes, v: Boxes, table: Table):
        """The same where key blocks go across pages. Those of a key block are found while the one
        before is loaded."""
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        following = self.find(tile, table, tile.begin)
        for block in cutlass.range(tile.begin, tile.end, unroll=1):
            found = following
            following = self.find(tile, table, block + 1)
            self.pages.load(k, self.head_dim, table, tile.head_kv, block, found, state)
            self.pages.load(v, self.head_dim_v, table, tile.head_kv, block, found, state)
            state.advance()

    def find(self, tile: Tile, table: Table, block) -> Int32:
        return self.pages.find(table, tile.batch, tile.seqlen_k, block)

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
    def load_q(self, tile: Tile, q, sq):
        """Gathers the rows of a tile. Columns beyond head_dim and rows beyond the tile's become
        zero."""
        tidx, _, _ = cute.arch.thread_idx()
        copy = staging.vector_copy(self.dtype, self.tile_m, self.head_dim)
        if tidx < copy.size:
            thr_copy = copy.get_slice(tidx)
            to_shared = thr_copy.partition_D(sq)
            where = thr_copy.partition_S(cute.make_identity_tensor((self.tile_m, self.head_dim)))
            vectors = cute.make_rmem_tensor_like(to_shared)
            vectors.fill(0.0)
            # All loads are under way before the first one's elements are stored.
            for i in cutlass.range_constexpr(cute.size(to_shared, mode=[1])):
                row = where[0, i, 0][0]
                if row < tile.rows:
                    query, head = self.query_and_head(tile, row)
                    for j in cutlass.range_constexpr(cute.size(to_shared, mode=[2])):
                        source = (tile.entry, tile.offset_q + query, head, where[0, 0, j][1])
                        self.load_vector(q, source, vectors[None, i, j])
            cute.copy(thr_copy, vectors, to_shared)

    @cute.jit
    def load_vector(self, q, source, vector):
        if source[3] < cute.size(q, mode=[3]):
            pointer = cute.make_ptr(
                self.dtype, utils.elem_pointer(q, source).toint(), cute.AddressSpace.gmem,
                assumed_align=16,
            )  # fmt: skip
            layout = cute.make_layout(staging.VECTOR)
            cute.autovec_copy(
                cute.make_tensor(pointer, layout), cute.make_tensor(vector.iterator, layout)
            )

    def tiled_mmas(self) -> tuple[cute.TiledMma, cute.TiledMma]:
        """Those of S^T and of O^T."""
        return (
            sm90_utils.make_tiled_mma(self.dtype, "K", "K", self.tile_m),
            sm90_utils.make_tiled_mma(self.dtype, "MN", "K", self.tile_m),
        )

    def products(self, shared: Shared, k: Load, v: Load, mma_qk, mma_pv) -> Products:
        scores, frag_k, frag_q = sm90_utils.partition_fragment_ABC(
            mma_qk.get_slice(0), (self.tile_n, self.tile_m, self.head_dim), k.stages, shared.q
        )
        outputs, frag_v, frag_p = sm90_utils.partition_fragment_ABC(
            mma_pv.get_slice(0),
            (self.products_v * PRODUCT_ROWS, self.tile_m, self.tile_n),
            self.transposed(v.stages),
            shared.weights,
        )
        return Products(mma_qk, mma_pv, frag_q, frag_k, frag_p, frag_v, scores, outputs)

    def transposed(self, sv: cute.Tensor) -> cute.Tensor:
        """V^T, [rows of the products, keys, stages]."""
        return cute.composition(
            sv,
            cute.make_layout(
                ((PRODUCT_ROWS, self.products_v), self.tile_n, self.stages),
                stride=(
                    (self.tile_n, self.product_step * self.tile_n),
                    1,
                    self.tile_n * self.head_dim_v,
                ),
            ),
        )

    def issue_scores(self, products: Products, stage: Int32):
        sm90_utils.gemm(
            products.mma_qk, products.scores, products.k[None, None, None, stage], products.q,
            zero_init=True, wg_wait=-1,
        )  # fmt: skip

    def issue_outputs(self, products: Products, stage: Int32, weights: Int32):
        sm90_utils.gemm(
            products.mma_pv, products.outputs, products.v[None, None, None, stage],
            products.weights[None, None, None, weights], wg_wait=-1,
        )  # fmt: skip

    def wait(self, under_way: int):
        """Waits until no more products than these are under way."""
        warpgroup.wait_group(under_way)

    @cute.jit
    def attend(
        self,
        tile: Tile,
        window: Window,
        q,
        shared: Shared,
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
        self.load_q(tile, q, shared.q)
        bounds = self.key_bounds(tile, window, shared.bounds)
        cute.arch.fence_view_async_shared()
        columns.sync()

        products = self.products(shared, k, v, mma_qk, mma_pv)
        products.outputs.fill(0.0)
        softmax = Softmax.create(scale_log2, self.where(mma_qk, self.tile_n), shared.numbers)
        softmax.begin()
        if tile.begin < tile.end:
            self.main_loop(tile, shared, k, v, products, bounds, softmax)
        columns.add_up(softmax)  # behind its barrier no warp reads keys or values any more
        self.keep(tile, products, softmax, output, row_lse)

    @cute.jit
    def main_loop(
        self,
        tile: Tile,
        shared: Shared,
        k: Load,
        v: Load,
        products: Products,
        bounds: KeyBounds,
        softmax: Softmax,
    ):
        """Adds up O^T. The tensor cores work on S^T of the next key block while the weights of this
        one go to shared memory, and on O^T of this one while the next one is masked."""
        tidx, _, _ = cute.arch.thread_idx()
        store_weights, _, _ = copy_utils.get_smem_store_C(
            products.mma_qk, layout_utils.transpose_view(shared.weights), tidx, transpose=True
        )
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        state_before = state.clone()
        k.pipeline.consumer_wait(state)
        self.issue_scores(products, state.index)
        self.wait(0)
        k.pipeline.consumer_release(state)
        for block in cutlass.range(tile.begin, tile.end, unroll=1):
            state_v = state.clone()
            state.advance()
            self.mask(products.scores, block * self.tile_n, bounds, softmax.where)
            raised = columns.any_of_warpgroup(columns.exceed(products.scores, softmax))
            self.wait(0)  # for O^T of the block before
            if block > tile.begin:
                v.pipeline.consumer_release(state_before)
            if raised:
                columns.raise_references(softmax, products.outputs)
            columns.exponentials(products.scores, softmax)
            weights = utils.cvt_f16(products.scores, self.dtype)
            if block + 1 < tile.end:
                k.pipeline.consumer_wait(state)
                self.issue_scores(products, state.index)
            store_weights(weights, block % WEIGHTS_STAGES)
            v.pipeline.consumer_wait(state_v)
            if (block + 1) * self.tile_n > tile.seqlen_k:
                staging.clear_rows(
                    v.stages[None, None, state_v.index],
                    (self.tile_n, self.head_dim_v),
                    tile.seqlen_k - block * self.tile_n,
                    tidx,
                )
            cute.arch.fence_view_async_shared()
            columns.sync()
            self.issue_outputs(products, state_v.index, block % WEIGHTS_STAGES)
            self.wait(1)  # for the scores of the next block
            if block + 1 < tile.end:
                k.pipeline.consumer_release(state)
            state_before = state_v
        self.wait(0)

    @cute.jit
    def keep(self, tile: Tile, products: Products, softmax: Softmax, output, row_lse):
        """Leaves the normalised outputs and the logsumexps where the cluster's CTAs find them."""
        outputs = layout_utils.reshape_acc_to_mn(products.outputs, transpose=True)
        where = self.where(products.mma_pv, PRODUCT_ROWS)
        # Rows beyond the tile's are kept too: nobody reads them, and no branch is taken.
        for r in cutlass.range_constexpr(cute.size(where, mode=[0])):
            row, total = where[r, 0][1], softmax.total[r]
            inverse = reciprocal(total)
            for c in cutlass.range_constexpr(cute.size(where, mode=[1])):
                for i in cutlass.range_constexpr(self.products_v):
                    column = i * self.product_step + where[r, c][0]
                    output[row, column] = outputs[r, (c, i)] * inverse
            if where[r, 0][0] == 0:
                row_lse[row] = logarithm(columns.base(softmax.reference[r]), total)

    def where(self, mma: cute.TiledMma, count: int) -> cute.Tensor:
        """The place of each of a thread's accumulators, [tile's rows, `count` of the product's], as
        (the product's, the tile's)."""
        tidx, _, _ = cute.arch.thread_idx()
        return layout_utils.reshape_acc_to_mn(
            mma.get_slice(tidx).partition_C(cute.make_identity_tensor((count, self.tile_m))),
            transpose=True,
        )

    @cute.jit
    def key_bounds(self, tile: Tile, window: Window, each: cute.Tensor) -> KeyBounds:
        tidx, _, _ = cute.arch.thread_idx()
        if tidx < self.tile_m:
            diagonal = (tile.first_row + tidx) // tile.ratio + tile.shift
            each[tidx, 0] = diagonal - window.left
            each[tidx, 1] = cutlass.min(diagonal + window.right + 1, tile.seqlen_k)
        all_first = (tile.first_row + tile.rows - 1) // tile.ratio + tile.shift - window.left
        all_end = cutlass.min(
            tile.first_row // tile.ratio + tile.shift + window.right + 1, tile.seqlen_k
        )
        return KeyBounds(each, all_first, all_end)

    @cute.jit
    def mask(self, acc_s, key: Int32, bounds: KeyBounds, where: cute.Tensor):
        if key < bounds.all_first or key + self.tile_n > bounds.all_end:
            scores = layout_utils.reshape_acc_to_mn(acc_s, transpose=True)
            for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
                row = where[r, 0][1]
                first, end = bounds.each[row, 0] - key, bounds.each[row, 1] - key
                for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                    seen = where[r, c][0] >= first and where[r, c][0] < end
                    scores[r, c] = scores[r, c] if seen else -Float32.inf

    @cute.jit
    def combine(self, tile, output, row_lse, weights, o, lse):
        """Combines the cluster's outputs. Each CTA writes its share of the tile."""
        tidx, _, _ = cute.arch.thread_idx()
        split, _, _ = cute.arch.block_in_cluster_idx()
        splits, _, _ = cute.arch.block_in_cluster_dim()
        self.weigh_splits(tile, row_lse, weights, lse)
        columns.sync()
        vectors = self.head_dim_v // OUTPUT_VECTOR
        for i in cutlass.range(split * CONSUMERS + tidx, tile.rows * vectors, splits * CONSUMERS):
            row, column = i // vectors, i % vectors * OUTPUT_VECTOR
            if column < cute.size(o, mode=[3]):
                self.combine_vector(tile, output, weights, o, row, column)

    @cute.jit
    def combine_vector(self, tile, output, weights, o, row: Int32, column: Int32):
        splits, _, _ = cute.arch.block_in_cluster_dim()
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
        target = utils.elem_pointer(o, (tile.entry, tile.offset_q + query, head, column)).toint()
        pointer = cute.make_ptr(
            self.dtype, target, cute.AddressSpace.gmem, assumed_align=2 * OUTPUT_VECTOR
        )
        cute.autovec_copy(result, cute.make_tensor(pointer, cute.make_layout(OUTPUT_VECTOR)))

    @cute.jit
    def weigh_splits(self, tile, row_lse, weights, lse):
        """Computes the weights of the CTAs' outputs, and the logsumexp of all keys. Neighbouring
        lanes have the CTAs of one row."""
        tidx, _, _ = cute.arch.thread_idx()
        split, _, _ = cute.arch.block_in_cluster_idx()
        splits, _, _ = cute.arch.block_in_cluster_dim()
        lane, first = tidx % MAX_SPLITS, tidx // MAX_SPLITS
        # A load from another CTA has a long latency, so all of them are issued at once.
        found = cute.make_rmem_tensor(self.tile_m // ROWS_WEIGHED, Float32)
        found.fill(-Float32.inf)
        for i in cutlass.range_constexpr(cute.size(found)):
            row = first + i * ROWS_WEIGHED
            if lane < splits and row < tile.rows:
                found[i] = self.remote(row_lse, row, lane)[0]
        for i in cutlass.range_constexpr(cute.size(found)):
            if i * ROWS_WEIGHED < tile.rows:
                row = first + i * ROWS_WEIGHED
                largest = cute.arch.warp_reduction_max(found[i], threads_in_group=MAX_SPLITS)
                largest = columns.base(largest)
                weight = cute.math.exp2((found[i] - largest) * LOG2_E, fastmath=True)
                total = cute.arch.warp_reduction_sum(weight, threads_in_group=MAX_SPLITS)
                if row < tile.rows:
                    weights[lane, row] = weight * reciprocal(total)
                    if split == 0 and lane == 0:
                        query, head = self.query_and_head(tile, row)
                        lse[tile.entry, head, tile.offset_q + query] = logarithm(
                            largest * LOG2_E, total
                        )

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
