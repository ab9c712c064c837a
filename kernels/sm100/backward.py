"""The SM100 backward: flash-attn-4's kernel class behind a flat entry. It computes dK, dV and the
fp32 accumulator of dQ."""

import inspect
from contextlib import contextmanager
from types import SimpleNamespace

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from flash_attn.cute import flash_bwd_sm100 as upstream
from flash_attn.cute.flash_bwd_sm100 import FlashAttentionBackwardSm100
from flash_attn.cute.tile_scheduler import SingleTileLPTBwdScheduler, SingleTileVarlenScheduler
from quack import layout_utils

from kernels.common import packed, symbolic
from kernels.common.head_ratio import AboveOne, head_ratio
from kernels.kernel import Kernel, Layout, Mask
from kernels.sm100.sequences import Loaded, OffsetRows, telling

upstream.SingleTileVarlenScheduler = packed.Scheduler


def select(tensor: cute.Tensor, mode: list[int]) -> cute.Tensor:
    """Selects modes and keeps those after them. Upstream's function would drop the last mode of
    packed rows, which says where a sequence ends."""
    return layout_utils.select(tensor, [*mode, *range(len(mode), cute.rank(tensor))])


upstream.layout_utils = SimpleNamespace(**vars(layout_utils) | {"select": select})


def _num_heads(schedule) -> Int32:
    """The number of query heads, as the parameters of the scheduler in use carry it: the compute
    warps get no query tensor."""
    if isinstance(schedule, SingleTileVarlenScheduler.Params):
        return schedule.decoder.num_head
    if isinstance(schedule, SingleTileLPTBwdScheduler.Params):
        return schedule.num_head_divmod.divisor
    return schedule.num_head


class Backward(FlashAttentionBackwardSm100):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # head_dim may be any multiple of 8 below the bucket
        self.check_hdim_oob = self.check_hdim_v_oob = True

    @contextmanager
    def run_time_ratio(self, num_heads, num_heads_kv):
        baked = self.qhead_per_kvhead
        if baked > 1:
            self.qhead_per_kvhead = AboveOne(head_ratio(num_heads, num_heads_kv))
        yield
        self.qhead_per_kvhead = baked

    def load(self, *args, **kwargs):
        given = inspect.signature(super().load).bind(*args, **kwargs).arguments
        if self.is_varlen_k:
            modes = {"mQ": 0, "mQt": 1, "mdO": 1, "mdOt": 0, "mK": 0, "mKt": 1, "mV": 0}
            rows = {
                name: OffsetRows(given[name], mode, of_keys="K" in name or "V" in name)
                for name, mode in modes.items()
                if given[name] is not None
            }
            create = telling(given["SeqlenInfoCls"], *rows.values(), given=Loaded.of)
            given |= rows | {"SeqlenInfoCls": create}
        with self.run_time_ratio(given["mQ"].shape[2], given["mK"].shape[2]):
            super().load(**given)

    def compute_loop(self, *args, **kwargs):
        given = inspect.signature(super().compute_loop).bind(*args, **kwargs).arguments
        (schedule,) = given["TileSchedulerCls"].args
        num_heads = _num_heads(schedule)
        with self.run_time_ratio(num_heads, given["mdK"].shape[1]):
            super().compute_loop(*args, **kwargs)


def instantiate(kernel: Kernel) -> Backward:
    return Backward(
        kernel.head_dim, kernel.head_dim_v, is_causal=kernel.mask is Mask.CAUSAL,
        is_local=kernel.mask is Mask.WINDOW,
        qhead_per_kvhead=2 if kernel.grouped else 1, tile_m=kernel.block_m, tile_n=kernel.block_n,
        cluster_size=2 if kernel.two_cta else 1, use_2cta_instrs=kernel.two_cta,
        deterministic=kernel.deterministic,
        spt=kernel.deterministic and kernel.mask is not Mask.FULL,
    )  # fmt: skip


def entry(kernel: Kernel):
    backward = instantiate(kernel)

    @cute.jit
    def backward_entry(
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
        window_size_left: Int32,
        window_size_right: Int32,
        dq_semaphore: cute.Tensor | None,
        dk_semaphore: cute.Tensor | None,
        dv_semaphore: cute.Tensor | None,
        stream: cuda.CUstream,
    ):
        window = (
            (window_size_left, window_size_right) if kernel.mask is Mask.WINDOW else (None, None)
        )
        if const_expr(kernel.layout is Layout.VARLEN):
            cu_seqlens_q, cu_seqlens_k = (
                packed.Offsets(cu_seqlens_q, q.shape[0]),
                packed.Offsets(cu_seqlens_k, k.shape[0]),
            )
            q, k, v, dout = (
                layout_utils.select(packed.sequences(tensor), [1, 2, 3, 0])
                for tensor in (q, k, v, dout)
            )
        backward(
            q, k, v, dout, lse_log2, delta, dq_accum, dk, dv, scale, cu_seqlens_q, cu_seqlens_k,
            window_size_left=window[0], window_size_right=window[1],
            mdQ_semaphore=dq_semaphore, mdK_semaphore=dk_semaphore, mdV_semaphore=dv_semaphore,
            stream=stream,
        )  # fmt: skip

    return backward_entry, symbolic.arguments(kernel)
