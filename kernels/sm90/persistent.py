"""SM90 forward of many queries: a persistent kernel of our own.

A thread block stays on its multiprocessor and works on one tile of queries after the other, in the order of tiles.py. Its
warpgroups never wait for a tile to begin: the first scores of the next tile are issued together with the last product of this one,
so that the tensor cores have work during the next tile's first softmax and this tile's last rescale and store.
docs/kernels-sm90.md has the pipeline, the barriers and what was tried.

Ratio of heads, lengths, strides and window bounds are run-time values: one object a dtype, bucket and kind of mask.
"""

import math
import operator
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import SmemAllocator
from flash_attn.cute import utils
from flash_attn.cute.cute_dsl_utils import assume_tensor_aligned
from quack import copy_utils, layout_utils, sm90_utils

from kernels.common import arguments as arg
from kernels.matrix import Kernel, Mask
from kernels.sm90 import staging, tiles

WARPGROUP = 128  # threads
ROWS = 64  # of a warpgroup: WGMMA's M
WARP_ROWS = ROWS // 4
# Registers of a consuming and of a loading thread, by the number of consuming warpgroups, as setmaxnreg, in steps of 8, can divide
# a multiprocessor's 65,536.
REGISTERS = {1: (240, 56), 2: (240, 24), 3: (160, 32)}
FIRST_TURN = 1  # of the named barriers, one a warpgroup: its turn to issue products. 0 is the thread block's
MASK_BITS = 16  # columns that a word of mask() covers; lowest_bits() shifts by up to as many
# A row's reference, which is subtracted before exp2, stays until a score exceeds it by 8, in powers of 2: weights up to 256 lose
# nothing in either dtype, and most blocks need no rescale of O, which costs as much as the sum of the weights.
LAZY = 8.0
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


class Divisors(NamedTuple):
    blocks: cute.FastDivmodDivisorV2  # of queries, a head
    units: cute.FastDivmodDivisorV2  # tiles.units, a head
    rest: cute.FastDivmodDivisorV2  # heads that are not paired
    heads: cute.FastDivmodDivisorV2
    ratio: cute.FastDivmodDivisorV2  # query heads a key/value head


class Work(NamedTuple):
    """What the tiles of a thread block follow from."""

    rows: Int32
    keys: Int32
    window_size_left: Int32
    window_size_right: Int32
    paired: Int32
    end: Int32  # of the cursors
    worker: Int32
    workers: Int32
    divisors: Divisors


class Tile(NamedTuple):
    row: Int32  # the first
    head: Int32
    head_kv: Int32
    batch: Int32
    begin: Int32  # blocks of keys, [begin, end), at least one
    end: Int32


class Sight(NamedTuple):
    """Which keys the rows of a thread's scores see."""

    first: tuple[Int32, Int32]  # key, a row, less the column of the thread's first score
    end: tuple[Int32, Int32]
    all_first: Int32  # of the keys that every row of the warpgroup sees
    all_end: Int32


class Loads(NamedTuple):
    """One of q, k and v on its way to shared memory."""

    atom: cute.CopyAtom
    source: cute.Tensor  # [seqlen, head_dim, heads, batch], as TMA takes coordinates
    stages: cute.Tensor


class Operands(NamedTuple):
    """What the products of a warpgroup read and write."""

    mma_qk: cute.TiledMma
    mma_pv: cute.TiledMma
    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    p: cute.Tensor
    scores: cute.Tensor
    o: cute.Tensor


class Softmax(NamedTuple):
    """Of a thread's two rows."""

    scale_log2: Float32
    reference: cute.Tensor
    total: cute.Tensor  # of the thread's own columns
    rescale: cute.Tensor  # what the sums so far must be multiplied by


@cute.jit
def choose(condition, a, b):
    return a if condition else b


class Persistent:
    def __init__(self, kernel: Kernel):
        self.dtype = arg.DTYPES[kernel.dtype]
        self.tile_m, self.tile_n = kernel.block_m, kernel.block_n
        self.head_dim, self.head_dim_v = kernel.head_dim, kernel.head_dim_v
        self.stages, self.q_stages = kernel.stages, kernel.q_stages
        if self.tile_m % ROWS or self.tile_m // ROWS not in REGISTERS:
            raise ValueError(f"block_m of {kernel.name} must be one to three times {ROWS}, is {self.tile_m}")
        self.warpgroups = self.tile_m // ROWS
        self.consumers = WARPGROUP * self.warpgroups
        self.turns = kernel.turns and self.warpgroups > 1
        self.causal, self.window = kernel.mask is Mask.CAUSAL, kernel.mask is Mask.WINDOW
        self.store_columns = math.gcd(self.head_dim_v, 64)  # of a swizzled row in shared memory

    @cute.jit
    def __call__(
        self, q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, o: cute.Tensor, lse: cute.Tensor, scale: Float32,
        window_size_left: Int32, window_size_right: Int32, workers: Int32, paired: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        by_head = [1, 3, 2, 0]  # [seqlen, head_dim, heads, batch]
        q, k, v, o = (layout_utils.select(assume_tensor_aligned(tensor), by_head) for tensor in (q, k, v, o))
        slabs = self.warpgroups * self.q_stages  # of a warpgroup's rows
        sq_layout = staging.smem_layout(self.dtype, ROWS, self.head_dim, slabs)
        sk_layout = staging.smem_layout(self.dtype, self.tile_n, self.head_dim, self.stages)
        sv_layout = staging.smem_layout(self.dtype, self.tile_n, self.head_dim_v, self.stages)
        so_layout = staging.smem_layout(self.dtype, ROWS, self.head_dim_v, self.warpgroups)
        store_layout = staging.smem_layout(self.dtype, WARP_ROWS, self.store_columns, 1)
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        atom_q, tma_q = self.tma(load, q, sq_layout, ROWS, self.head_dim)
        atom_k, tma_k = self.tma(load, k, sk_layout, self.tile_n, self.head_dim)
        atom_v, tma_v = self.tma(load, v, sv_layout, self.tile_n, self.head_dim_v)
        atom_o, tma_o = self.tma(store, o, store_layout, WARP_ROWS, self.store_columns)
        mma_qk = sm90_utils.make_tiled_mma(self.dtype, "K", "K", self.tile_n)
        mma_pv = sm90_utils.make_tiled_mma(self.dtype, "K", "MN", self.head_dim_v, source="RS")
        heads, ratio = cute.size(q, mode=[2]), cute.size(q, mode=[2]) // cute.size(k, mode=[2])
        every_head = heads * cute.size(q, mode=[3])
        blocks = cute.ceil_div(cute.size(q, mode=[0]), self.tile_m)
        rest = cutlass.max(every_head - paired, 1)
        divisors = Divisors(*(cute.FastDivmodDivisorV2(n) for n in (blocks, tiles.units(blocks), rest, heads, ratio)))
        end = tiles.end(every_head, paired, blocks)
        self.kernel(
            atom_q, tma_q, atom_k, tma_k, atom_v, tma_v, atom_o, tma_o, lse, scale * LOG2_E, window_size_left, window_size_right,
            paired, end, divisors, sq_layout, sk_layout, sv_layout, so_layout, mma_qk, mma_pv,
        ).launch(
            grid=[cutlass.min(workers, end), 1, 1], block=[WARPGROUP + self.consumers, 1, 1], stream=stream, min_blocks_per_mp=1
        )  # fmt: skip

    def tma(self, op, tensor: cute.Tensor, layout: cute.ComposedLayout, rows: int, columns: int):
        return cpasync.make_tiled_tma_atom(op, tensor, cute.select(layout, mode=[0, 1]), (rows, columns), 1)

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

        return Storage

    @cute.kernel
    def kernel(
        self, atom_q: cute.CopyAtom, tma_q: cute.Tensor, atom_k: cute.CopyAtom, tma_k: cute.Tensor,
        atom_v: cute.CopyAtom, tma_v: cute.Tensor, atom_o: cute.CopyAtom, tma_o: cute.Tensor, lse: cute.Tensor,
        scale_log2: Float32, window_size_left: Int32, window_size_right: Int32, paired: Int32, end: Int32, divisors: Divisors,
        sq_layout: cute.ComposedLayout, sk_layout: cute.ComposedLayout, sv_layout: cute.ComposedLayout,
        so_layout: cute.ComposedLayout, mma_qk: cute.TiledMma, mma_pv: cute.TiledMma,
    ):  # fmt: skip
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for atom in (atom_q, atom_k, atom_v, atom_o):
                cpasync.prefetch_descriptor(atom)
        storage = SmemAllocator().allocate(self.shared_storage(sq_layout, sk_layout, sv_layout, so_layout))
        warps = self.consumers // 32
        pipeline_q = staging.tma_pipeline(self.dtype, storage.barriers_q, sq_layout, self.q_stages, warps, copies=self.warpgroups)
        pipeline_k = staging.tma_pipeline(self.dtype, storage.barriers_k, sk_layout, self.stages, warps)
        pipeline_v = staging.tma_pipeline(self.dtype, storage.barriers_v, sv_layout, self.stages, warps)
        pipeline.pipeline_init_arrive()
        sq = storage.q.get_tensor(sq_layout.outer, swizzle=sq_layout.inner)
        sk = storage.k.get_tensor(sk_layout.outer, swizzle=sk_layout.inner)
        sv = storage.v.get_tensor(sv_layout.outer, swizzle=sv_layout.inner)
        so = storage.o.get_tensor(so_layout.outer, swizzle=so_layout.inner)
        pipeline.pipeline_init_wait()
        worker, _, _ = cute.arch.block_idx()
        workers, _, _ = cute.arch.grid_dim()
        rows, keys = cute.size(tma_q, mode=[0]), cute.size(tma_k, mode=[0])
        work = Work(rows, keys, window_size_left, window_size_right, paired, end, worker, workers, divisors)
        consumer_registers, producer_registers = REGISTERS[self.warpgroups]
        if warp < WARPGROUP // 32:
            cute.arch.setmaxregister_decrease(producer_registers)
            if warp == 0:
                q, k, v = Loads(atom_q, tma_q, sq), Loads(atom_k, tma_k, sk), Loads(atom_v, tma_v, sv)
                self.load(work, q, pipeline_q, k, pipeline_k, v, pipeline_v)
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            self.attend(
                work, sq, pipeline_q, sk, pipeline_k, sv, pipeline_v, atom_o, tma_o, so, lse, mma_qk, mma_pv, scale_log2
            )  # fmt: skip

    @cute.jit
    def following(self, work: Work, cursor: Int32, flip: Int32):
        blocks, units = work.divisors.blocks.divisor, work.divisors.units
        return tiles.following(cursor, flip, work.worker, work.workers, work.paired, blocks, units, choose)

    @cute.jit
    def tile(self, work: Work, cursor: Int32, flip: Int32) -> Tile:
        blocks, units, rest, heads, ratio = work.divisors
        if const_expr(self.causal):
            entry, block = tiles.causal(cursor, flip, work.paired, blocks.divisor, units, rest, choose)
        else:
            entry, block = tiles.full(cursor, blocks)
        batch, head = divmod(entry, heads)
        head_kv, _ = divmod(head, ratio)
        row = block * self.tile_m
        begin, end = Int32(0), cute.ceil_div(work.keys, self.tile_n)
        if const_expr(self.causal or self.window):
            shift = work.keys - work.rows
            last = cutlass.min(row + self.tile_m, work.rows) - 1
            first_key, end_key = Int32(0), cutlass.min(last + shift + 1, work.keys)
            if const_expr(self.window):
                first_key = cutlass.max(row + shift - work.window_size_left, 0)
                end_key = cutlass.min(last + shift + work.window_size_right + 1, work.keys)
            empty = end_key <= first_key  # no row sees a key: a block in which everything is masked
            begin = choose(empty, 0, first_key // self.tile_n)
            end = choose(empty, 1, cute.ceil_div(end_key, self.tile_n))
        return Tile(row, head, head_kv, batch, begin, end)

    @cute.jit
    def load(self, work: Work, q: Loads, pipeline_q, k: Loads, pipeline_k, v: Loads, pipeline_v):
        """Queries, keys and values of all tiles, in the order in which the consumers take them."""
        producer = pipeline.PipelineUserType.Producer
        state_q = pipeline.make_pipeline_state(producer, self.q_stages)
        state_k = pipeline.make_pipeline_state(producer, self.stages)
        state_v = pipeline.make_pipeline_state(producer, self.stages)
        cursor, flip = tiles.first(work.worker)
        while cursor < work.end:
            tile = self.tile(work, cursor, flip)
            pipeline_q.producer_acquire(state_q)
            for i in cutlass.range_constexpr(self.warpgroups):
                stage = q.stages[None, None, state_q.index * self.warpgroups + i]
                self.copy(q, tile.row + i * ROWS, tile.head, tile.batch, stage, pipeline_q.producer_get_barrier(state_q))
            pipeline_q.producer_commit(state_q)
            state_q.advance()
            self.load_block(k, pipeline_k, tile, tile.begin, state_k)
            state_k.advance()
            for block in cutlass.range(tile.begin + 1, tile.end, unroll=1):
                self.load_block(k, pipeline_k, tile, block, state_k)
                state_k.advance()
                self.load_block(v, pipeline_v, tile, block - 1, state_v)
                state_v.advance()
            self.load_block(v, pipeline_v, tile, tile.end - 1, state_v)
            state_v.advance()
            cursor, flip = self.following(work, cursor, flip)
        # The last arrivals of the consumers must find the thread block's shared memory.
        pipeline_q.producer_tail(state_q)
        pipeline_k.producer_tail(state_k)
        pipeline_v.producer_tail(state_v)

    def load_block(self, loads: Loads, pipeline, tile: Tile, block: Int32, state):
        pipeline.producer_acquire(state)
        stage, barrier = loads.stages[None, None, state.index], pipeline.producer_get_barrier(state)
        self.copy(loads, block * self.tile_n, tile.head_kv, tile.batch, stage, barrier)
        pipeline.producer_commit(state)

    def copy(self, loads: Loads, row: Int32, head: Int32, batch: Int32, stage: cute.Tensor, barrier):
        source = cute.domain_offset((row, 0), loads.source[None, None, head, batch])
        source = cute.local_tile(source, cute.product_each(stage.shape), (0, 0))
        copy, _, _ = copy_utils.tma_get_copy_fn(loads.atom, 0, cute.make_layout(1), source, stage, single_stage=True)
        copy(tma_bar_ptr=barrier)

    @cute.jit
    def attend(
        self, work: Work, sq, pipeline_q, sk, pipeline_k, sv, pipeline_v, atom_o, tma_o, so, lse, mma_qk, mma_pv, scale_log2
    ):  # fmt: skip
        """Attention of one warpgroup's rows of all tiles."""
        thread, _, _ = cute.arch.thread_idx()
        group = cute.arch.make_warp_uniform(thread // WARPGROUP) - 1
        thread = thread % WARPGROUP
        _, frag_q, frag_k = sm90_utils.partition_fragment_ABC(mma_qk.get_slice(0), (ROWS, self.tile_n, self.head_dim), sq, sk)
        acc_o, frag_p, frag_v = sm90_utils.partition_fragment_ABC(
            mma_pv.get_slice(0), (ROWS, self.head_dim_v, self.tile_n), None, layout_utils.transpose_view(sv)
        )
        scores = cute.make_rmem_tensor(mma_qk.partition_shape_C((ROWS, self.tile_n)), Float32)
        operands = Operands(mma_qk, mma_pv, frag_q, frag_k, frag_v, frag_p, scores, acc_o)
        acc_o.fill(0.0)
        softmax = Softmax(scale_log2, *(cute.make_rmem_tensor(2, Float32) for _ in range(3)))
        reference, total = (cute.make_rmem_tensor(2, Float32) for _ in range(2))  # of the tile that ends
        softmax.reference.fill(-Float32.inf)
        softmax.total.fill(0.0)
        consumer = pipeline.PipelineUserType.Consumer
        state_q = pipeline.make_pipeline_state(consumer, self.q_stages)
        state_k = pipeline.make_pipeline_state(consumer, self.stages)
        state_v = pipeline.make_pipeline_state(consumer, self.stages)
        if const_expr(self.turns):  # noqa: SIM102, at compile time, the other at run time
            if group == 0:
                self.give_turn(group)

        cursor, flip = tiles.first(work.worker)
        tile = self.tile(work, cursor, flip)
        cursor, flip = self.following(work, cursor, flip)
        upcoming = self.tile(work, cursor, flip)
        sight = self.sight(work, tile, group, thread, mma_qk)
        pipeline_q.consumer_wait(state_q)
        pipeline_k.consumer_wait(state_k)
        self.issue_scores(operands, state_q.index * self.warpgroups + group, state_k.index)
        warpgroup.wait_group(0)
        pipeline_k.consumer_release(state_k)
        state_k.advance()
        if tile.begin + 1 == tile.end:
            pipeline_q.consumer_release(state_q)
        self.mask(scores, tile.begin, sight, self.window)
        self.exponentials(scores, softmax)
        utils.cvt_f16(layout_utils.reshape_acc_to_frgA(scores), frag_p)

        accumulate = Boolean(False)  # the tile's first product overwrites O
        more = Boolean(True)
        while more:
            index_q = state_q.index * self.warpgroups + group
            # Blocks of a window's left edge, blocks that all rows see, blocks of the right edge. A branch between the issue of a
            # product and the wait for it would make the compiler wait at the branch, so each kind has a loop.
            left_end = tile.begin + 1
            if const_expr(self.window):
                left_end = cutlass.max(left_end, cutlass.min(cute.ceil_div(sight.all_first, self.tile_n), tile.end))
            free_end = cutlass.max(left_end, cutlass.min(sight.all_end // self.tile_n, tile.end))
            if const_expr(self.window):
                for block in cutlass.range(tile.begin + 1, left_end, unroll=1):
                    self.issue(operands, group, index_q, pipeline_k, state_k, pipeline_v, state_v, accumulate)
                    self.await_scores(pipeline_k, state_k)
                    state_k.advance()
                    if block + 1 == tile.end:
                        pipeline_q.consumer_release(state_q)
                    self.mask(scores, block, sight, True)
                    needed = self.exponentials(scores, softmax)
                    self.finish(operands, softmax, needed, pipeline_v, state_v)
                    state_v.advance()
                    accumulate = Boolean(True)
            for block in cutlass.range(left_end, free_end, unroll=1):
                self.issue(operands, group, index_q, pipeline_k, state_k, pipeline_v, state_v, accumulate)
                self.await_scores(pipeline_k, state_k)
                state_k.advance()
                if block + 1 == tile.end:
                    pipeline_q.consumer_release(state_q)
                needed = self.exponentials(scores, softmax)
                self.finish(operands, softmax, needed, pipeline_v, state_v)
                state_v.advance()
                accumulate = Boolean(True)
            for block in cutlass.range(free_end, tile.end, unroll=1):
                self.issue(operands, group, index_q, pipeline_k, state_k, pipeline_v, state_v, accumulate)
                self.await_scores(pipeline_k, state_k)
                state_k.advance()
                if block + 1 == tile.end:
                    pipeline_q.consumer_release(state_q)
                self.mask(scores, block, sight, False)
                needed = self.exponentials(scores, softmax)
                self.finish(operands, softmax, needed, pipeline_v, state_v)
                state_v.advance()
                accumulate = Boolean(True)
            state_q.advance()
            reference.store(softmax.reference.load())
            total.store(softmax.total.load())
            more = cursor < work.end
            ahead = upcoming
            if more:
                sight = self.sight(work, upcoming, group, thread, mma_qk)
                pipeline_q.consumer_wait(state_q)
                index_q = state_q.index * self.warpgroups + group
                softmax.reference.fill(-Float32.inf)
                softmax.total.fill(0.0)
                # What comes after is computed while the tensor cores work.
                if upcoming.begin * self.tile_n < sight.all_first or (upcoming.begin + 1) * self.tile_n > sight.all_end:
                    self.issue(operands, group, index_q, pipeline_k, state_k, pipeline_v, state_v, accumulate)
                    cursor, flip = self.following(work, cursor, flip)
                    ahead = self.tile(work, cursor, flip)
                    self.await_scores(pipeline_k, state_k)
                    self.mask(scores, upcoming.begin, sight, self.window)
                    self.exponentials(scores, softmax)
                    warpgroup.wait_group(0)
                else:
                    self.issue(operands, group, index_q, pipeline_k, state_k, pipeline_v, state_v, accumulate)
                    cursor, flip = self.following(work, cursor, flip)
                    ahead = self.tile(work, cursor, flip)
                    self.await_scores(pipeline_k, state_k)
                    self.exponentials(scores, softmax)
                    warpgroup.wait_group(0)
                state_k.advance()
                if upcoming.begin + 1 == upcoming.end:
                    pipeline_q.consumer_release(state_q)
            else:
                pipeline_v.consumer_wait(state_v)
                self.wait_turn(group)
                self.issue_output(operands, state_v.index, accumulate)
                self.pass_turn(group)
                warpgroup.wait_group(0)
            pipeline_v.consumer_release(state_v)
            state_v.advance()
            self.store(work, tile, group, thread, operands, reference, total, scale_log2, atom_o, tma_o, so, lse)
            utils.cvt_f16(layout_utils.reshape_acc_to_frgA(scores), frag_p)
            accumulate = Boolean(False)
            tile = upcoming
            upcoming = ahead
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    def issue(self, operands, group, index_q, pipeline_k, state_k, pipeline_v, state_v, accumulate):
        """Scores of the next block, and the last block's weights times values."""
        pipeline_k.consumer_wait(state_k, pipeline_k.consumer_try_wait(state_k))
        self.wait_turn(group)
        self.issue_scores(operands, index_q, state_k.index)
        pipeline_v.consumer_wait(state_v, pipeline_v.consumer_try_wait(state_v))
        self.issue_output(operands, state_v.index, accumulate)
        self.pass_turn(group)

    def await_scores(self, pipeline_k, state_k):
        warpgroup.wait_group(1)
        pipeline_k.consumer_release(state_k)

    def finish(self, operands: Operands, softmax: Softmax, needed: Boolean, pipeline_v, state_v):
        """Waits for O; the new weights take the place of those just used."""
        warpgroup.wait_group(0)
        pipeline_v.consumer_release(state_v)
        utils.cvt_f16(layout_utils.reshape_acc_to_frgA(operands.scores), operands.p)
        self.rescale(operands.o, softmax.rescale, needed)

    def issue_scores(self, x: Operands, index_q, index_k):
        q, k = x.q[None, None, None, index_q], x.k[None, None, None, index_k]
        sm90_utils.gemm(x.mma_qk, x.scores, q, k, zero_init=True, wg_wait=-1)

    @cute.jit
    def issue_output(self, x: Operands, index_v, accumulate):
        sm90_utils.gemm(x.mma_pv, x.o, x.p, x.v[None, None, None, index_v], zero_init=not accumulate, wg_wait=-1)

    def wait_turn(self, group):
        if const_expr(self.turns):
            cute.arch.barrier(barrier_id=FIRST_TURN + group, number_of_threads=2 * WARPGROUP)

    def give_turn(self, group):
        cute.arch.barrier_arrive(barrier_id=FIRST_TURN + group, number_of_threads=2 * WARPGROUP)

    def pass_turn(self, group):
        if const_expr(self.turns):
            self.give_turn((group + 1) % self.warpgroups)

    @cute.jit
    def sight(self, work: Work, tile: Tile, group, thread, mma_qk) -> Sight:
        where = layout_utils.reshape_acc_to_mn(mma_qk.get_slice(thread).partition_C(cute.make_identity_tensor((ROWS, self.tile_n))))
        diagonal = tile.row + group * ROWS + work.keys - work.rows
        left, right = work.window_size_left, work.window_size_right
        first, end = [], []
        for r in cutlass.range_constexpr(2):
            row, column = diagonal + where[r, 0][0], where[0, 0][1]
            first.append(row - left - column)
            end.append((cutlass.min(row + right + 1, work.keys) if self.causal or self.window else work.keys) - column)
        all_first = cutlass.max(diagonal + ROWS - 1 - left, 0) if self.window else Int32(0)
        all_end = cutlass.max(cutlass.min(diagonal + right + 1, work.keys), 0) if self.causal or self.window else work.keys
        return Sight(tuple(first), tuple(end), all_first, all_end)

    @cute.jit
    def mask(self, scores, block, sight: Sight, left: cutlass.Constexpr):
        """The bits of a word say which of some columns are seen: half of the instructions that a comparison a score takes."""
        scores = layout_utils.reshape_acc_to_mn(scores)
        for r in cutlass.range_constexpr(2):
            seen = self.columns_before(sight.end[r] - block * self.tile_n)
            hidden = self.columns_before(sight.first[r] - block * self.tile_n) if left else 0
            for c in cutlass.range_constexpr(0, cute.size(scores, mode=[1]), MASK_BITS):
                bits = self.lowest_bits(seen - c)
                if const_expr(left):
                    bits = bits & ~self.lowest_bits(hidden - c)
                for i in cutlass.range_constexpr(min(MASK_BITS, cute.size(scores, mode=[1]) - c)):
                    scores[r, c + i] = scores[r, c + i] if bits & (1 << i) else -Float32.inf

    def columns_before(self, key):
        """How many of a thread's columns, which are two of every eight, are less than a key."""
        key = cutlass.max(key, 0)
        return (key // 8) * 2 + cutlass.min(key % 8, 2)

    def lowest_bits(self, count):
        return (Int32(1) << cutlass.min(cutlass.max(count, 0), MASK_BITS)) - 1

    @cute.jit
    def exponentials(self, scores, softmax: Softmax) -> Boolean:
        """Of the scores, in their place; whether any row's older sums must be rescaled."""
        scores = layout_utils.reshape_acc_to_mn(scores)
        scale = softmax.scale_log2
        for r in cutlass.range_constexpr(2):
            row = scores[r, None].load()
            before = softmax.reference[r]
            largest = cute.arch.warp_reduction_max(utils.fmax_reduce(row, before), threads_in_group=4)
            largest = before if (largest - before) * scale <= LAZY else largest
            softmax.reference[r] = largest
            base = Float32(0.0) if largest == -Float32.inf else largest
            softmax.rescale[r] = cute.math.exp2((before - base) * scale, fastmath=True)
            weights = cute.math.exp2(row * scale - base * scale, fastmath=True)
            softmax.total[r] = utils.fadd_reduce(weights, softmax.total[r] * softmax.rescale[r])
            scores[r, None].store(weights)
        # A total is never negative: to ask ties the vote to the last exponential. Without it D 64 was 2% slower.
        unlike = softmax.rescale[0] != 1.0 or softmax.rescale[1] != 1.0 or softmax.total[0] < 0.0 or softmax.total[1] < 0.0
        return cute.arch.vote_any_sync(unlike)

    @cute.jit
    def rescale(self, acc_o, factors, needed):
        if needed:
            outputs = layout_utils.reshape_acc_to_mn(acc_o)
            for r in cutlass.range_constexpr(2):
                outputs[r, None].store(outputs[r, None].load() * factors[r])

    @cute.jit
    def store(
        self, work: Work, tile: Tile, group, thread, operands: Operands, reference, total, scale_log2, atom_o, tma_o, so, lse
    ):
        """Normalised O and logsumexp. Every warp stores its own rows, so that none waits for another."""
        outputs = layout_utils.reshape_acc_to_mn(operands.o)
        sums = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            sums[r] = utils.warp_reduce(total[r], operator.add, width=4)
            none = sums[r] == 0.0 or sums[r] != sums[r]
            outputs[r, None].store(outputs[r, None].load() * cute.arch.rcp_approx(Float32(1.0) if none else sums[r]))
        result = cute.make_rmem_tensor_like(operands.o, self.dtype)
        utils.cvt_f16(operands.o, result)
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # the tile before has left shared memory
        cute.arch.sync_warp()
        slab = so[None, None, group]
        atom = copy_utils.get_smem_store_atom(self.dtype)
        copy = cute.make_tiled_copy_C(atom, operands.mma_pv).get_slice(thread)
        cute.copy(atom, copy.retile(result), copy.partition_D(slab))
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        warp = cute.arch.make_warp_uniform(thread // 32)
        row = tile.row + group * ROWS + warp * WARP_ROWS
        if row < work.rows:
            target = cute.domain_offset((row, 0), tma_o[None, None, tile.head, tile.batch])
            shape = (WARP_ROWS, self.store_columns)
            for i in cutlass.range_constexpr(self.head_dim_v // self.store_columns):
                source, part = cute.local_tile(slab, shape, (warp, i)), cute.local_tile(target, shape, (0, i))
                write, _, _ = copy_utils.tma_get_copy_fn(atom_o, 0, cute.make_layout(1), source, part, single_stage=True)
                write()
        cute.arch.cp_async_bulk_commit_group()
        lane = thread % 32
        for r in cutlass.range_constexpr(2):
            query = row + lane // 4 + 8 * r
            if lane % 4 == 0 and query < work.rows:
                none = sums[r] == 0.0 or sums[r] != sums[r]
                value = (reference[r] * scale_log2 + cute.math.log2(sums[r], fastmath=True)) * LN_2
                lse[tile.batch, tile.head, query] = -Float32.inf if none else value


def entry(kernel: Kernel):
    persistent = Persistent(kernel)

    @cute.jit
    def persistent_entry(
        q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, o: cute.Tensor, lse: cute.Tensor, scale: Float32,
        window_size_left: Int32, window_size_right: Int32, workers: Int32, paired: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        persistent(q, k, v, o, lse, scale, window_size_left, window_size_right, workers, paired, stream)

    return persistent_entry, arg.persistent(kernel)
