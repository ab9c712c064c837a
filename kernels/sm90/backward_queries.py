"""The first pass of the SM90 backward in two passes: dQ, and delta = rowsum(dO * O) for the second.

A CTA works on one query tile, in two consumer warpgroups of 64 rows each. Per key block each
computes

    S = Q K^T,  P = exp(scale S - logsumexp),  dP = dO V^T,  dS = P (dP - delta),  dQ += dS K

with dS as an operand from registers and dQ in registers until its end: no accumulator in memory,
no order of additions that varies. What lies between two products of one warpgroup is computed
during the products of the other.

The ratio of heads, lengths, strides and window bounds are run-time values, so there is one object
for each dtype, bucket, layout and kind of mask.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.pipeline import PipelineState
from cutlass.utils import SmemAllocator
from flash_attn.cute import utils
from flash_attn.cute.pipeline import PipelineStateSimple
from quack import layout_utils, sm90_utils

from kernels.common import packed, symbolic, tile_slots
from kernels.kernel import Kernel, Layout, Mask
from kernels.sm90 import backward_parts, staging
from kernels.sm90.backward_parts import Loads
from kernels.sm90.barriers import Barrier
from kernels.sm90.masks import Edge
from kernels.sm90.output import Destination, Output
from kernels.sm90.schedule import Schedule, Tile
from kernels.sm90.softmax import LOG2_E
from kernels.sm90.staging import Load
from kernels.sm90.visibility import Bounds, Visibility, masks_of, visibility_of
from kernels.sm90.warpgroups import ROW_LANES, ROWS, WARP, WARP_ROWS, WARPGROUP, WARPS, Turns

TILE_WORDS = 12  # int32, of a Tile and padding
VECTOR = 8  # elements of 16 bytes
# Named barriers, one a warpgroup, behind those of the turns.
ROWS_READ = max(Barrier) + 1


class Dense(NamedTuple):
    """The query tiles of a dense tensor."""

    rows: Int32
    keys: Int32
    heads: Int32
    heads_kv: Int32
    batch: Int32
    together: Int32  # query heads in work at a time


class Varlen(NamedTuple):
    """The query tiles of packed sequences."""

    offsets_q: packed.Offsets
    offsets_k: packed.Offsets
    heads: Int32
    heads_kv: Int32


class Rows(NamedTuple):
    """What delta is computed from and written to: tensors as the caller gave them."""

    o: cute.Tensor
    dout: cute.Tensor
    lse: cute.Tensor
    delta: cute.Tensor


class Statistics(NamedTuple):
    """What a thread knows of its two rows."""

    lse: cute.Tensor  # in base 2
    delta: cute.Tensor


@dataclass(frozen=True)
class Operands:
    """What the products of a warpgroup read and write."""

    mma_s: cute.TiledMma  # S and dP
    mma_dq: cute.TiledMma
    q: cute.Tensor
    dout: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    k_of_dq: cute.Tensor
    scores: cute.Tensor  # S, then P
    d_scores: cute.Tensor  # dP, then dS
    ds: cute.Tensor  # in 16 bits
    dq: cute.Tensor


@dataclass(frozen=True)
class Warpgroup:
    """What a consuming warpgroup works with."""

    index: Int32
    visibility: Visibility
    scale_log2: Float32
    operands: Operands
    bounds: Bounds
    rows: Statistics
    loads: Loads


class States(NamedTuple):
    """Where a warpgroup is in each pipeline."""

    k: PipelineState  # at the key block of S
    k_of_dq: PipelineState
    v: PipelineState


class BackwardQueries:
    def __init__(self, kernel: Kernel):
        self.dtype = symbolic.DTYPES[kernel.dtype]
        self.tile_m, self.tile_n = kernel.block_m, kernel.block_n
        self.head_dim, self.head_dim_v = kernel.head_dim, kernel.head_dim_v
        self.warpgroups = self.tile_m // ROWS
        self.consumers = WARPGROUP * self.warpgroups
        self.consumer_registers = kernel.consumer_registers
        self.producer_registers = kernel.producer_registers
        self.k_stages, self.v_stages = kernel.stages, kernel.v_stages
        self.varlen = kernel.layout is Layout.VARLEN
        self.causal, self.biased = kernel.mask is Mask.CAUSAL, kernel.mask is Mask.BIAS
        self.schedule, self.masks = Schedule(kernel), masks_of(kernel, ROWS)
        self.turns = Turns(self.warpgroups, kernel.pingpong)
        # dQ leaves like an output, of Q's head dim.
        self.output = Output(
            replace(kernel, head_dim_v=kernel.head_dim), self.dtype, ROWS, by_tma=True
        )

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        o: cute.Tensor,
        dout: cute.Tensor,
        lse: cute.Tensor,
        delta: cute.Tensor,
        dq: cute.Tensor,
        scale: Float32,
        cu_seqlens_q: cute.Tensor | None,
        cu_seqlens_k: cute.Tensor | None,
        window_size_left: Int32,
        window_size_right: Int32,
        bias: cute.Tensor | None,
        lists: cute.Tensor | None,
        stream: cuda.CUstream,
    ):
        heads, heads_kv = q.shape[-2], k.shape[-2]
        uncovered = dq
        if const_expr(not self.varlen):
            batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
            bytes_of_key = (k.shape[3] + v.shape[3]) * (self.dtype.width // 8)
            together = backward_parts.heads_in_l2(keys, bytes_of_key) * (heads // heads_kv)
            order = Dense(rows, keys, heads, heads_kv, batch, together)
            num_ctas = cute.ceil_div(rows, self.tile_m) * heads * batch
        else:
            offsets_q = packed.Offsets(cu_seqlens_q, q.shape[0])
            order = Varlen(offsets_q, packed.Offsets(cu_seqlens_k, k.shape[0]), heads, heads_kv)
            num_ctas = tile_slots.packed_slots(offsets_q, self.tile_m) * heads
        rows = Rows(
            *(staging.by_head(packed.assume_tensor_aligned(x)) for x in (o, dout)), lse, delta
        )
        if const_expr(self.varlen):
            q, k, v, dout, dq = (packed.sequences(tensor) for tensor in (q, k, v, dout, dq))
        q, k, v, dout, dq = (
            staging.by_head(packed.assume_tensor_aligned(tensor)) for tensor in (q, k, v, dout, dq)
        )
        sq_layout = staging.smem_layout(self.dtype, ROWS, self.head_dim, self.warpgroups)
        sdo_layout = staging.smem_layout(self.dtype, ROWS, self.head_dim_v, self.warpgroups)
        sk_layout = staging.smem_layout(self.dtype, self.tile_n, self.head_dim, self.k_stages)
        sv_layout = staging.smem_layout(self.dtype, self.tile_n, self.head_dim_v, self.v_stages)
        load = cpasync.CopyBulkTensorTileG2SOp()
        atom_q, tma_q = staging.tma(load, q, sq_layout, ROWS, self.head_dim)
        atom_do, tma_do = staging.tma(load, dout, sdo_layout, ROWS, self.head_dim_v)
        atom_k, tma_k = staging.tma(load, k, sk_layout, self.tile_n, self.head_dim)
        atom_v, tma_v = staging.tma(load, v, sv_layout, self.tile_n, self.head_dim_v)
        atom_dq, tma_dq = self.output.tma(dq)
        mma_s = sm90_utils.make_tiled_mma(self.dtype, "K", "K", self.tile_n)
        mma_dq = sm90_utils.make_tiled_mma(self.dtype, "K", "MN", self.head_dim, source="RS")
        self.kernel(
            atom_q, tma_q, atom_do, tma_do, atom_k, tma_k, atom_v, tma_v, atom_dq, tma_dq, rows,
            uncovered, scale,
            visibility_of(window_size_left, window_size_right, bias, lists, scale), order,
            sq_layout, sdo_layout, sk_layout, sv_layout, mma_s, mma_dq,
        ).launch(
            grid=[num_ctas, 1, 1], block=[WARPGROUP + self.consumers, 1, 1], stream=stream,
            min_blocks_per_mp=1
        )  # fmt: skip

    def shared_storage(self, sq_layout, sdo_layout, sk_layout, sv_layout):
        @cute.struct
        class Storage:
            q: staging.elements(self.dtype, sq_layout)
            dout: staging.elements(self.dtype, sdo_layout)
            k: staging.elements(self.dtype, sk_layout)
            v: staging.elements(self.dtype, sv_layout)
            tile: cute.struct.Align[cute.struct.MemRange[Int32, TILE_WORDS], 16]
            barriers_q: cute.struct.MemRange[cutlass.Int64, self.warpgroups * 2]
            barriers_do: cute.struct.MemRange[cutlass.Int64, self.warpgroups * 2]
            barriers_k: cute.struct.MemRange[cutlass.Int64, self.k_stages * 2]
            barriers_v: cute.struct.MemRange[cutlass.Int64, self.v_stages * 2]

        return Storage

    @cute.kernel
    def kernel(
        self,
        atom_q: cute.CopyAtom,
        tma_q: cute.Tensor,
        atom_do: cute.CopyAtom,
        tma_do: cute.Tensor,
        atom_k: cute.CopyAtom,
        tma_k: cute.Tensor,
        atom_v: cute.CopyAtom,
        tma_v: cute.Tensor,
        atom_dq: cute.CopyAtom,
        dq: cute.Tensor,
        rows: Rows,
        uncovered: cute.Tensor,
        scale: Float32,
        visibility: Visibility,
        order: Dense | Varlen,
        sq_layout: cute.ComposedLayout,
        sdo_layout: cute.ComposedLayout,
        sk_layout: cute.ComposedLayout,
        sv_layout: cute.ComposedLayout,
        mma_s: cute.TiledMma,
        mma_dq: cute.TiledMma,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for atom in (atom_q, atom_do, atom_k, atom_v, atom_dq):
                cpasync.prefetch_descriptor(atom)
        storage = SmemAllocator().allocate(
            self.shared_storage(sq_layout, sdo_layout, sk_layout, sv_layout)
        )
        all_warps = self.warpgroups * WARPS
        pipeline_q = staging.tma_pipeline(
            self.dtype, storage.barriers_q, sq_layout, self.warpgroups, WARPS
        )
        pipeline_do = staging.tma_pipeline(
            self.dtype, storage.barriers_do, sdo_layout, self.warpgroups, WARPS
        )
        pipeline_k = staging.tma_pipeline(
            self.dtype, storage.barriers_k, sk_layout, self.k_stages, all_warps
        )
        pipeline_v = staging.tma_pipeline(
            self.dtype, storage.barriers_v, sv_layout, self.v_stages, all_warps
        )
        pipeline.pipeline_init_arrive()
        sq = storage.q.get_tensor(sq_layout.outer, swizzle=sq_layout.inner)
        sdo = storage.dout.get_tensor(sdo_layout.outer, swizzle=sdo_layout.inner)
        sk = storage.k.get_tensor(sk_layout.outer, swizzle=sk_layout.inner)
        sv = storage.v.get_tensor(sv_layout.outer, swizzle=sv_layout.inner)
        loads = Loads(
            Load(atom_q, tma_q, sq, pipeline_q),
            Load(atom_k, tma_k, sk, pipeline_k),
            Load(atom_v, tma_v, sv, pipeline_v),
            Load(atom_do, tma_do, sdo, pipeline_do),
        )
        words = storage.tile.get_tensor(cute.make_layout(TILE_WORDS))
        if warp == 0:
            self.write(self.find(order, visibility), words)
        if const_expr(self.varlen):
            packed.clear_outside(uncovered, order.offsets_q)
        pipeline.pipeline_init_wait()  # the tile is in shared memory, too
        tile = self.read(words)
        if warp < WARPS:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if warp == 0 and tile.end > 0:
                self.load(tile, visibility, loads)
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            if tile.end > 0:
                to = Destination(dq, None, atom_dq, sq)
                self.compute(tile, visibility, loads, rows, mma_s, mma_dq, scale, to)

    @cute.jit
    def find(self, order: Dense | Varlen, visibility: Visibility) -> Tile:
        """The tile of the CTA; without one, its end is 0. One warp does it."""
        cta, _, _ = cute.arch.block_idx()
        if const_expr(self.varlen):
            place = tile_slots.packed_place(cta, order.offsets_q, self.tile_m)
            head, batch = place.head, Int32(0)
            begin_q, begin_k = order.offsets_q[place.sequence], order.offsets_k[place.sequence]
            end_q = cutlass.max(order.offsets_q[place.sequence + 1], begin_q)
            end_k = cutlass.max(order.offsets_k[place.sequence + 1], begin_k)
            rows, keys = end_q - begin_q, end_k - begin_k
        else:
            rows, keys = order.rows, order.keys
            end_q, end_k = rows, keys
            place = backward_parts.dense_place(
                cta, cute.ceil_div(rows, self.tile_m), order.heads * order.batch, order.together
            )
            head, batch = place.head % order.heads, place.head // order.heads
        # Under a causal mask, which a bias may be, a head's last tile costs most.
        last_first = self.causal or self.biased
        index = place.tiles - 1 - place.tile if last_first else place.tile
        row = index * self.tile_m
        begin, end = self.schedule.positions(batch, head, index, rows, keys, visibility)
        end = end if place.tiles > 0 else 0
        head_kv = head // (order.heads // order.heads_kv)
        return Tile(row, head, head_kv, begin, end, batch, rows, keys, end_q, end_k)

    @cute.jit
    def write(self, tile: Tile, words: cute.Tensor):
        if cute.arch.lane_idx() == 0:
            for i in cutlass.range_constexpr(len(tile)):
                words[i] = tile[i]

    def read(self, words: cute.Tensor) -> Tile:
        found = cute.make_rmem_tensor(TILE_WORDS, Int32)
        cute.autovec_copy(words, found)
        return Tile(*(cute.arch.make_warp_uniform(found[i]) for i in range(len(Tile._fields))))

    @cute.jit
    def load(self, tile: Tile, visibility: Visibility, loads: Loads):
        """Loads all that the consumers take, in their order."""
        q, dout, k, v = loads.q, loads.dout, loads.k, loads.v
        producer = pipeline.PipelineUserType.Producer
        state_q, state_do = (
            pipeline.make_pipeline_state(producer, self.warpgroups) for _ in range(2)
        )
        state_k = pipeline.make_pipeline_state(producer, self.k_stages)
        state_v = pipeline.make_pipeline_state(producer, self.v_stages)
        self.masks.load_block(k, tile, tile.begin, visibility, state_k)
        state_k.advance()
        self.load_queries(q, tile, state_q)
        self.masks.load_block(v, tile, tile.begin, visibility, state_v)
        state_v.advance()
        self.load_queries(dout, tile, state_do)
        for position in cutlass.range(tile.begin + 1, tile.end, unroll=1):
            self.masks.load_block(k, tile, position, visibility, state_k)
            state_k.advance()
            self.masks.load_block(v, tile, position, visibility, state_v)
            state_v.advance()

    @cute.jit
    def load_queries(self, load: Load, tile: Tile, state):
        """Loads the rows of each warpgroup."""
        source = staging.rows_of(
            load.source, tile.head, tile.batch, tile.rows, tile.end_q, self.varlen
        )
        for i in cutlass.range_constexpr(self.warpgroups):
            staging.load_rows(load, source, tile.row + i * ROWS, state)
            state.advance()

    def operands(self, loads: Loads, mma_s, mma_dq) -> Operands:
        scores, frag_q, frag_k = sm90_utils.partition_fragment_ABC(
            mma_s.get_slice(0), (ROWS, self.tile_n, self.head_dim), loads.q.stages, loads.k.stages
        )
        d_scores, frag_do, frag_v = sm90_utils.partition_fragment_ABC(
            mma_s.get_slice(0),
            (ROWS, self.tile_n, self.head_dim_v),
            loads.dout.stages,
            loads.v.stages,
        )
        dq, frag_ds, frag_kt = sm90_utils.partition_fragment_ABC(
            mma_dq.get_slice(0),
            (ROWS, self.head_dim, self.tile_n),
            None,
            layout_utils.transpose_view(loads.k.stages),
        )
        return Operands(
            mma_s, mma_dq, frag_q, frag_do, frag_k, frag_v, frag_kt, scores, d_scores, frag_ds, dq
        )

    @cute.jit
    def compute(
        self,
        tile: Tile,
        visibility: Visibility,
        loads: Loads,
        rows: Rows,
        mma_s,
        mma_dq,
        scale: Float32,
        to: Destination,
    ):
        """Computes one warpgroup's rows of dQ, and of delta."""
        thread, _, _ = cute.arch.thread_idx()
        index = cute.arch.make_warp_uniform(thread // WARPGROUP) - 1
        thread = thread % WARPGROUP
        self.turns.begin(index)
        bounds = self.masks.key_bounds(tile, visibility, index, thread, mma_s)
        group = Warpgroup(
            index,
            visibility,
            scale * LOG2_E,
            self.operands(loads, mma_s, mma_dq),
            bounds,
            self.statistics(tile, index, thread, rows),
            loads,
        )
        self.all_blocks(group, tile)
        dq = group.operands.dq
        dq.store(dq.load() * scale)
        result = cute.make_rmem_tensor_like(dq, self.dtype)
        utils.cvt_f16(dq, result)
        # dQ leaves through the room of the warpgroup's rows of Q.
        cute.arch.barrier(barrier_id=ROWS_READ + index, number_of_threads=WARPGROUP)
        warp = cute.arch.make_warp_uniform(thread // WARP)
        row = tile.row + index * ROWS + warp * WARP_ROWS
        self.output.write_by_tma(tile, row, index, thread, result, to, mma_dq)
        self.output.finish()

    @cute.jit
    def statistics(self, tile: Tile, index, thread, rows: Rows) -> Statistics:
        """Computes delta of a thread's two rows, writes it for the second pass, and reads lse. Of a
        row's four lanes each takes every fourth 16 bytes.

        Nothing branches between the loads, so that all are on their way at once: behind the last
        row they read the last row, and beyond head_dim an earlier column.
        """
        found = Statistics(*(cute.make_rmem_tensor(2, Float32) for _ in range(2)))
        part = thread % ROW_LANES
        whose = tile.head, tile.batch, tile.end_q - tile.rows, self.varlen
        o, dout = (staging.plain_rows(tensor, *whose) for tensor in (rows.o, rows.dout))
        lse, delta = (staging.row_numbers(numbers, *whose) for numbers in (rows.lse, rows.delta))
        first = tile.row + index * ROWS + thread // WARP * WARP_ROWS + thread % WARP // ROW_LANES
        vectors = self.head_dim_v // (VECTOR * ROW_LANES)
        ours, theirs = (cute.make_rmem_tensor((VECTOR, vectors, 2), self.dtype) for _ in range(2))
        for r in cutlass.range_constexpr(2):
            row = cutlass.min(first + 8 * r, tile.rows - 1)
            found.lse[r] = lse[row]
            for i in cutlass.range_constexpr(vectors):
                column = cutlass.min((i * ROW_LANES + part) * VECTOR, o.shape[1] - VECTOR)
                cute.autovec_copy(self.vector(o, row, column), ours[None, i, r])
                cute.autovec_copy(self.vector(dout, row, column), theirs[None, i, r])
        for r in cutlass.range_constexpr(2):
            total = Float32(0.0)
            for i in cutlass.range_constexpr(vectors):
                a, b = (x[None, i, r].load().to(Float32) for x in (ours, theirs))
                inside = (i * ROW_LANES + part) * VECTOR < o.shape[1]
                total += (a * b).reduce(cute.ReductionOp.ADD, 0.0, 0) if inside else 0.0
            found.delta[r] = cute.arch.warp_reduction_sum(total, threads_in_group=ROW_LANES)
            row = first + 8 * r
            own = found.lse[r] if row < tile.rows else -Float32.inf
            found.lse[r] = backward_parts.base_2(own, self.biased)
            if part == 0 and row < tile.rows:
                delta[row] = found.delta[r]
        return found

    def vector(self, tensor: cute.Tensor, row: Int32, column: Int32) -> cute.Tensor:
        """16 bytes of a row."""
        pointer = tensor.iterator + cute.crd2idx((row, column), tensor.layout)
        return cute.make_tensor(pointer.align(16), cute.make_layout(VECTOR))

    @cute.jit
    def all_blocks(self, group: Warpgroup, tile: Tile):
        """Adds up dQ over the key blocks. S of the next one is issued beside dQ of this one."""
        x, consumer = group.operands, pipeline.PipelineUserType.Consumer
        states = States(
            pipeline.make_pipeline_state(consumer, self.k_stages),
            pipeline.make_pipeline_state(consumer, self.k_stages),
            pipeline.make_pipeline_state(consumer, self.v_stages),
        )
        x.dq.fill(0.0)
        end = self.end(tile, group.bounds)
        own = PipelineStateSimple(self.warpgroups, group.index)
        group.loads.q.pipeline.consumer_wait(own)
        group.loads.k.pipeline.consumer_wait(states.k)
        self.turns.wait(group.index)
        self.issue_scores(group, states)
        self.turns.end(group.index)
        group.loads.dout.pipeline.consumer_wait(own)
        warpgroup.wait_group(0)
        states.k.advance()
        self.weigh_first(group, states, tile.begin)
        spans = self.masks.spans(tile.begin + 1, end, group.bounds)
        for i in cutlass.range_constexpr(len(spans)):
            for position in cutlass.range(spans[i].begin, spans[i].end, unroll=1):
                fetched = self.next_block(group, states, position, spans[i].edge)
                states.k.advance()
                states.k_of_dq.advance()
                states.v.advance()
                self.weigh(group, states, position, spans[i].edge, fetched)
        self.last_block(group, states)
        states.k_of_dq.advance()
        states.v.advance()
        for _ in cutlass.range(end, tile.end, unroll=1):
            self.skip(group, states)
            states.k_of_dq.advance()
            states.v.advance()

    @cute.jit
    def weigh_first(self, group: Warpgroup, states: States, position):
        """Computes dS of the first key block, whose S there is."""
        edge = self.masks.first_edge
        if const_expr(self.biased) and self.masks.sees_all(group.bounds, position):
            self.weigh(group, states, position, None, None)
        else:
            fetched = self.masks.fetch(position, group.bounds, group.visibility, edge)
            self.weigh(group, states, position, edge, fetched)

    @cute.jit
    def weigh(self, group: Warpgroup, states: States, position, edge: cutlass.Constexpr, fetched):
        """Computes dS of a key block, whose S there is."""
        x = group.operands
        self.probabilities(group, position, edge, fetched)
        group.loads.v.pipeline.consumer_wait(states.v)
        self.turns.wait(group.index, backward_parts.zero_after_exponentials(x.scores))
        self.issue_d_scores(group, states)
        self.turns.end(group.index)
        warpgroup.wait_group(0)
        group.loads.v.pipeline.consumer_release(states.v)
        weights, d_scores = (layout_utils.reshape_acc_to_mn(t) for t in (x.scores, x.d_scores))
        for r in cutlass.range_constexpr(2):
            d_scores[r, None].store(
                weights[r, None].load() * (d_scores[r, None].load() - group.rows.delta[r])
            )
        utils.cvt_f16(layout_utils.reshape_acc_to_frgA(x.d_scores), x.ds)

    @cute.jit
    def probabilities(self, group: Warpgroup, position, edge: cutlass.Constexpr, fetched):
        """Replaces the scores by P."""
        if const_expr(edge is not None):
            scores = group.operands.scores
            self.masks.mask(scores, position, group.bounds, edge, group.visibility, fetched)
        scores = layout_utils.reshape_acc_to_mn(group.operands.scores)
        for r in cutlass.range_constexpr(2):
            exponents = scores[r, None].load() * group.scale_log2 - group.rows.lse[r]
            scores[r, None].store(cute.math.exp2(exponents, fastmath=True))

    def next_block(self, group: Warpgroup, states: States, position, edge: Edge | None):
        """Adds a key block's product to dQ, and computes S of the next one, which is at `position`.
        What its mask needs is read before the products are waited for."""
        keys = group.loads.k.pipeline
        keys.consumer_wait(states.k, keys.consumer_try_wait(states.k))
        self.turns.wait(group.index)
        self.issue_dq(group, states)
        self.issue_scores(group, states)
        self.turns.end(group.index)
        fetched = self.masks.fetch(position, group.bounds, group.visibility, edge)
        warpgroup.wait_group(1)
        keys.consumer_release(states.k_of_dq)
        warpgroup.wait_group(0)
        return fetched

    def last_block(self, group: Warpgroup, states: States):
        self.turns.wait(group.index)
        self.issue_dq(group, states)
        self.turns.end(group.index)
        warpgroup.wait_group(0)
        group.loads.k.pipeline.consumer_release(states.k_of_dq)

    def skip(self, group: Warpgroup, states: States):
        """Releases a key block that only other warpgroups' rows see, and passes both its turns."""
        for load, state in ((group.loads.v, states.v), (group.loads.k, states.k_of_dq)):
            load.pipeline.consumer_wait(state)
            load.pipeline.consumer_release(state)
            self.turns.wait(group.index)
            self.turns.end(group.index)

    def issue_scores(self, group: Warpgroup, states: States):
        x = group.operands
        q, k = x.q[None, None, None, group.index], x.k[None, None, None, states.k.index]
        sm90_utils.gemm(x.mma_s, x.scores, q, k, zero_init=True, wg_wait=-1)

    def issue_d_scores(self, group: Warpgroup, states: States):
        x = group.operands
        dout, v = x.dout[None, None, None, group.index], x.v[None, None, None, states.v.index]
        sm90_utils.gemm(x.mma_s, x.d_scores, dout, v, zero_init=True, wg_wait=-1)

    def issue_dq(self, group: Warpgroup, states: States):
        x = group.operands
        k = x.k_of_dq[None, None, None, states.k_of_dq.index]
        sm90_utils.gemm(x.mma_dq, x.dq, x.ds, k, zero_init=False, wg_wait=-1)

    @cute.jit
    def end(self, tile: Tile, bounds: Bounds) -> Int32:
        """The end of the key blocks that the warpgroup works on: those that any of its rows sees,
        and at least one. With a bias nothing is known of single warpgroups."""
        if const_expr(self.biased):
            return tile.end
        end = cutlass.max(cute.ceil_div(bounds.any_end, self.tile_n), tile.begin + 1)
        return cutlass.min(end, tile.end)


def entry(kernel: Kernel):
    return BackwardQueries(kernel), symbolic.arguments(kernel)
