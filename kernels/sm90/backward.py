"""The SM90 backward: flash-attn-4's kernel class behind a flat entry. It computes dK, dV and the
fp32 accumulator of dQ."""

from dataclasses import dataclass
from functools import partial

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from flash_attn.cute import flash_bwd_sm90 as upstream
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.seqlen_info import SeqlenInfoQK

from kernels.common import packed, symbolic
from kernels.common.head_ratio import AboveOne, head_ratio
from kernels.kernel import Kernel, Layout, Mask

upstream.assume_tensor_aligned = packed.assume_tensor_aligned
upstream.SingleTileVarlenScheduler = packed.Scheduler


@dataclass(frozen=True)
class Loads(SeqlenInfoQK):
    """The place of a sequence that the backward loads. Its Q, dO, K and V are tensors of
    `packed.sequences`."""

    def offset_batch_Q(self, tensor, batch_idx, dim, padded=False, **options):
        if padded:  # lse and delta, in the workspace
            return super().offset_batch_Q(tensor, batch_idx, dim, padded=True, **options)
        return packed.queries_of(tensor, 0, self)

    def offset_batch_K(self, tensor, batch_idx, dim, **_):
        return packed.keys_of(tensor, 0, self)

    @staticmethod
    def create(batch_idx, **given):
        return packed.as_subclass(Loads, SeqlenInfoQK.create(batch_idx, **given))


class Backward(FlashAttentionBackwardSm90):
    def __init__(self, dtype, head_dim, head_dim_v, qhead_per_kvhead, **options):
        # Upstream refuses GQA with unequal head dims, because dK is staged in the shared memory of
        # V and K, which is then too small. dO's shared memory lies behind it and is free at that
        # point, because a CTA works on a single key block; so dK may extend into it.
        super().__init__(dtype, head_dim, head_dim_v, 1, **options)
        self.qhead_per_kvhead = qhead_per_kvhead
        rows_k, rows_q = (
            self.tile_n * self.dtype.width,
            self.tile_m * self.dO_stage * self.dtype.width,
        )
        room = rows_k * (self.tile_hdim + self.tile_hdimv) + rows_q * self.tile_hdimv
        assert qhead_per_kvhead == 1 or self.tile_n * self.tile_hdim * Float32.width <= room

    def __call__(self, mQ, mK, *args, **kwargs):
        baked = self.qhead_per_kvhead
        if baked > 1:
            self.qhead_per_kvhead = AboveOne(head_ratio(mQ.shape[-2], mK.shape[-2]))
        super().__call__(mQ, mK, *args, **kwargs)
        self.qhead_per_kvhead = baked

    def load(self, *args):
        if self.varlen_k:
            args = [
                partial(Loads.create, **x.keywords) if packed.makes_lengths(x) else x for x in args
            ]
        super().load(*args)

    def epilogue_dKV(self, *args):
        qhead_per_kvhead_divmod = args[-3]
        if qhead_per_kvhead_divmod is not None:  # this region's own copy of the host's value
            self.qhead_per_kvhead = AboveOne(qhead_per_kvhead_divmod.divisor)
        super().epilogue_dKV(*args)


def instantiate(kernel: Kernel) -> Backward:
    return Backward(
        symbolic.DTYPES[kernel.dtype],
        kernel.head_dim,
        kernel.head_dim_v,
        2 if kernel.grouped else 1,
        is_causal=kernel.mask is Mask.CAUSAL,
        is_local=kernel.mask is Mask.WINDOW,
        deterministic=kernel.deterministic,
        tile_m=kernel.block_m,
        tile_n=kernel.block_n,
        Q_stage=kernel.q_stages,
        dO_stage=kernel.do_stages,
        PdS_stage=kernel.pds_stages,
        SdP_swapAB=kernel.swap_ab_sdp,
        dKV_swapAB=kernel.swap_ab_dkv,
        dQ_swapAB=kernel.swap_ab,
        AtomLayoutMSdP=1,
        AtomLayoutNdKV=kernel.atom_layout_dkv,
        AtomLayoutMdQ=kernel.atom_layout_m,
        num_threads=384,
        V_in_regs=False,
        dQ_single_wg=kernel.dq_warpgroups == 1,
    )


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
            q, k, v, dout = (packed.sequences(tensor) for tensor in (q, k, v, dout))
        backward(
            q, k, v, dout, lse_log2, delta, dq_accum, dk, dv, scale, cu_seqlens_q, cu_seqlens_k,
            window_size_left=window[0], window_size_right=window[1],
            mdQ_semaphore=dq_semaphore, mdK_semaphore=dk_semaphore, mdV_semaphore=dv_semaphore,
            stream=stream,
        )  # fmt: skip

    return backward_entry, symbolic.arguments(kernel)
