"""SM100 backward: dK, dV and the fp32 accumulator of dQ. flash-attn-4's kernel class behind a flat entry."""

import inspect
from contextlib import contextmanager

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32
from flash_attn.cute.flash_bwd_sm100 import FlashAttentionBackwardSm100
from flash_attn.cute.tile_scheduler import SingleTileLPTBwdScheduler, SingleTileVarlenScheduler

from kernels.common import arguments as arg
from kernels.common.head_ratio import AboveOne, head_ratio
from kernels.matrix import Kernel, Mask


def _num_heads(schedule) -> Int32:
    """Query heads, as the parameters of the scheduler in use carry them: the compute warps get no query tensor."""
    if isinstance(schedule, SingleTileVarlenScheduler.Params):
        return schedule.decoder.num_head
    if isinstance(schedule, SingleTileLPTBwdScheduler.Params):
        return schedule.num_head_divmod.divisor
    return schedule.num_head


class Backward(FlashAttentionBackwardSm100):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.check_hdim_oob = self.check_hdim_v_oob = True  # head_dim may be any multiple of 8 below the bucket

    @contextmanager
    def run_time_ratio(self, num_heads, num_heads_kv):
        baked = self.qhead_per_kvhead
        if baked > 1:
            self.qhead_per_kvhead = AboveOne(head_ratio(num_heads, num_heads_kv))
        yield
        self.qhead_per_kvhead = baked

    def load(self, *args, **kwargs):
        mQ, mK = args[5:7]
        with self.run_time_ratio(mQ.shape[2], mK.shape[2]):
            super().load(*args, **kwargs)

    def compute_loop(self, *args, **kwargs):
        given = inspect.signature(super().compute_loop).bind(*args, **kwargs).arguments
        (schedule,) = given["TileSchedulerCls"].args
        num_heads = _num_heads(schedule)
        with self.run_time_ratio(num_heads, given["mdK"].shape[1]):
            super().compute_loop(*args, **kwargs)


def instantiate(kernel: Kernel) -> Backward:
    return Backward(
        kernel.head_dim, kernel.head_dim_v, is_causal=kernel.mask is Mask.CAUSAL, is_local=kernel.mask is Mask.WINDOW,
        qhead_per_kvhead=2 if kernel.grouped else 1, tile_m=kernel.block_m, tile_n=kernel.block_n,
        cluster_size=2 if kernel.two_cta else 1, use_2cta_instrs=kernel.two_cta, deterministic=kernel.deterministic,
        spt=kernel.deterministic and kernel.mask is not Mask.FULL,
    )  # fmt: skip


def entry(kernel: Kernel):
    backward = instantiate(kernel)

    @cute.jit
    def backward_entry(
        q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, dout: cute.Tensor, lse_log2: cute.Tensor, delta: cute.Tensor,
        dq_accum: cute.Tensor, dk: cute.Tensor, dv: cute.Tensor, scale: Float32,
        cu_seqlens_q: cute.Tensor | None, cu_seqlens_k: cute.Tensor | None, window_size_left: Int32, window_size_right: Int32,
        dq_semaphore: cute.Tensor | None, dk_semaphore: cute.Tensor | None, dv_semaphore: cute.Tensor | None, stream: cuda.CUstream,
    ):  # fmt: skip
        window = (window_size_left, window_size_right) if kernel.mask is Mask.WINDOW else (None, None)
        backward(
            q, k, v, dout, lse_log2, delta, dq_accum, dk, dv, scale, cu_seqlens_q, cu_seqlens_k,
            window_size_left=window[0], window_size_right=window[1],
            mdQ_semaphore=dq_semaphore, mdK_semaphore=dk_semaphore, mdV_semaphore=dv_semaphore, stream=stream,
        )  # fmt: skip

    return backward_entry, arg.backward(kernel)
