"""The epilogue of a tile: a warpgroup writes normalised O and logsumexp. Every warp stores its own
rows, so that none waits for another."""

import math
import operator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync
from flash_attn.cute import utils
from quack import copy_utils, layout_utils

from kernels.kernel import Kernel
from kernels.sm90 import staging
from kernels.sm90.schedule import Tile
from kernels.sm90.softmax import Softmax
from kernels.sm90.warpgroups import ROW_LANES, WARP, WARPS

LN_2 = math.log(2)


class Destination(NamedTuple):
    # [seqlen, head_dim, heads, batch]. Where O leaves from registers into packed sequences: [total,
    # head_dim, heads].
    o: cute.Tensor
    lse: cute.Tensor  # [batch, heads, seqlen], varlen [heads, total]
    # The TMA atom, and shared memory with a stage for each warpgroup. Both are None where O leaves
    # from registers.
    atom: cute.CopyAtom
    stages: cute.Tensor


class Output:
    def __init__(self, kernel: Kernel, dtype, rows: int, by_tma: bool):
        """`rows` are the query rows of a warpgroup. O leaves by TMA where shared memory has room
        for it, which is 2% faster, else from registers."""
        self.dtype, self.rows, self.warp_rows, self.by_tma = dtype, rows, rows // WARPS, by_tma
        self.head_dim_v, self.warpgroups = kernel.head_dim_v, kernel.block_m // rows
        self.varlen = kernel.packed
        self.store_columns = math.gcd(self.head_dim_v, 64)  # of a swizzled row in shared memory

    def stages_layout(self):
        return (
            staging.smem_layout(self.dtype, self.rows, self.head_dim_v, self.warpgroups)
            if self.by_tma
            else None
        )

    def tma(self, o: cute.Tensor):
        layout = staging.smem_layout(self.dtype, self.warp_rows, self.store_columns, 1)
        return staging.tma(
            cpasync.CopyBulkTensorTileS2GOp(), o, layout, self.warp_rows, self.store_columns
        )

    @cute.jit
    def store(self, tile: Tile, group, thread, acc_o, softmax: Softmax, to: Destination, mma_pv):
        """Stores the rows of a tile; `softmax` has their sums and references."""
        outputs = layout_utils.reshape_acc_to_mn(acc_o)
        sums = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            sums[r] = utils.warp_reduce(softmax.total[r], operator.add, width=ROW_LANES)
            none = sums[r] == 0.0 or sums[r] != sums[r]
            outputs[r, None].store(
                outputs[r, None].load() * cute.arch.rcp_approx(Float32(1.0) if none else sums[r])
            )
        result = cute.make_rmem_tensor_like(acc_o, self.dtype)
        utils.cvt_f16(acc_o, result)
        warp = cute.arch.make_warp_uniform(thread // WARP)
        row = tile.row + group * self.rows + warp * self.warp_rows
        if const_expr(self.by_tma):
            self.write_by_tma(tile, row, group, thread, result, to, mma_pv)
        else:
            self.write_from_registers(tile, row, result, to)
        lane = thread % WARP
        for r in cutlass.range_constexpr(2):
            query = row + lane // ROW_LANES + 8 * r
            if lane % ROW_LANES == 0 and query < tile.rows:
                none = sums[r] == 0.0 or sums[r] != sums[r]
                value = (
                    softmax.reference[r] * softmax.scale_log2
                    + cute.math.log2(sums[r], fastmath=True)
                ) * LN_2
                value = -Float32.inf if none else value
                if const_expr(self.varlen):
                    to.lse[tile.head, tile.end_q - tile.rows + query] = value
                else:
                    to.lse[tile.batch, tile.head, query] = value

    @cute.jit
    def write_by_tma(self, tile: Tile, row, group, thread, result, to: Destination, mma_pv):
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # the tile before has left shared memory
        cute.arch.sync_warp()
        stage = to.stages[None, None, group]
        copy = cute.make_tiled_copy_C(copy_utils.get_smem_store_atom(self.dtype), mma_pv).get_slice(
            thread
        )
        cute.copy(copy, copy.retile(result), copy.partition_D(stage))
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        if row < tile.rows:
            source = staging.rows_of(
                to.o, tile.head, tile.batch, tile.rows, tile.end_q, self.varlen
            )
            target = cute.domain_offset((row, 0), source)
            shape, warp = (
                (self.warp_rows, self.store_columns),
                cute.arch.make_warp_uniform(thread // WARP),
            )
            for i in cutlass.range_constexpr(self.head_dim_v // self.store_columns):
                source, part = (
                    cute.local_tile(stage, shape, (warp, i)),
                    cute.local_tile(target, shape, (0, i)),
                )
                write, _, _ = copy_utils.tma_get_copy_fn(
                    to.atom, 0, cute.make_layout(1), source, part, single_stage=True
                )
                write()
        cute.arch.cp_async_bulk_commit_group()

    def finish(self):
        """Waits after the last tile until shared memory has been read."""
        if const_expr(self.by_tma):
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def write_from_registers(self, tile: Tile, row, result, to: Destination):
        """Stores O from registers. A thread holds two columns of every eight. The four lanes of a
        row exchange them until each has all of one eight."""
        lane = cute.arch.lane_idx()
        part = lane % ROW_LANES
        odd, high = part % 2 == 1, part >= 2
        words = cute.recast_tensor(layout_utils.reshape_acc_to_mn(result), Int32)
        first = tile.end_q - tile.rows
        target = staging.plain_rows(to.o, tile.head, tile.batch, first, self.varlen)
        for r in cutlass.range_constexpr(2):
            query = row + lane // ROW_LANES + 8 * r
            for i in cutlass.range_constexpr(0, self.head_dim_v // 8, ROW_LANES):
                (a, b), (c, d) = (
                    self.exchange(words[r, j], words[r, j + 1], odd, 1) for j in (i, i + 2)
                )
                (a, c), (b, d) = self.exchange(a, c, high, 2), self.exchange(b, d, high, 2)
                column = 8 * (i + part)
                if query < tile.rows and column < cute.size(target, mode=[1]):
                    eight = cute.make_rmem_tensor(4, Int32)
                    for j, word in enumerate((a, b, c, d)):
                        eight[j] = word
                    pointer = target.iterator + cute.crd2idx((query, column), target.layout)
                    where = cute.make_tensor(pointer.align(16), cute.make_layout(8))
                    cute.autovec_copy(cute.recast_tensor(eight, self.dtype), where)

    @cute.jit
    def exchange(self, a: Int32, b: Int32, second, distance: int):
        """Gives the first of two lanes both lanes' a, and the second both lanes' b."""
        other = cute.arch.shuffle_sync_bfly(a if second else b, distance)
        return (other if second else a), (b if second else other)
