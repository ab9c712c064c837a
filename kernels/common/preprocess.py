"""The kernel before a backward: it computes delta = rowsum(dO * O) and lse in base 2, and clears
the dQ accumulator. Both architectures share it."""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, const_expr
from flash_attn.cute import flash_bwd_preprocess as upstream
from flash_attn.cute.flash_bwd_preprocess import FlashAttentionBackwardPreprocess

from kernels.common import packed, symbolic, tile_slots
from kernels.kernel import Kernel, Layout

upstream.SingleTileVarlenScheduler = tile_slots.Scheduler


class Preprocess(FlashAttentionBackwardPreprocess):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.check_hdim_v_oob = True  # head_dim may be any multiple of 8 below the bucket


def instantiate(kernel: Kernel) -> Preprocess:
    return Preprocess(
        symbolic.DTYPES[kernel.dtype], kernel.head_dim, kernel.head_dim_v, kernel.block_m
    )


def entry(kernel: Kernel):
    preprocess = instantiate(kernel)

    @cute.jit
    def preprocess_entry(
        o: cute.Tensor,
        dout: cute.Tensor,
        delta: cute.Tensor,
        lse: cute.Tensor,
        lse_log2: cute.Tensor,
        dq_accum: cute.Tensor,
        cu_seqlens_q: cute.Tensor | None,
        stream: cuda.CUstream,
    ):
        if const_expr(kernel.layout is Layout.VARLEN):
            cu_seqlens_q = packed.Offsets(cu_seqlens_q, o.shape[0])
        preprocess(
            o,
            dout,
            delta,
            lse,
            lse_log2,
            dq_accum,
            cu_seqlens_q,
            None,
            None,
            None,
            None,
            Float32(1.0),
            stream=stream,
        )

    return preprocess_entry, symbolic.arguments(kernel)
