"""After the backward: an fp32 accumulator, in the order its writer stored it, to dQ, dK or dV. One class for both architectures."""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32
from flash_attn.cute.bwd_accum_tile import AccumTileOrder
from flash_attn.cute.flash_bwd_postprocess import FlashAttentionBackwardPostprocess

from kernels.common import arguments as arg
from kernels.matrix import Kernel


def instantiate(kernel: Kernel) -> FlashAttentionBackwardPostprocess:
    order = AccumTileOrder.TMEM_FRAG_2CTA if kernel.two_cta else AccumTileOrder.TMEM_FRAG_1CTA
    if kernel.block_m == 64:  # dK's and dV's of D 256
        order = AccumTileOrder.ROW_MAJOR
    return FlashAttentionBackwardPostprocess(
        arg.DTYPES[kernel.dtype], kernel.head_dim, kernel.arch, kernel.block_m, kernel.threads, kernel.atom_layout_m,
        kernel.swap_ab, use_2cta_instrs=kernel.two_cta, cluster_size=kernel.cluster,
        accum_order=order if kernel.arch == 100 else None,
    )  # fmt: skip


def entry(kernel: Kernel):
    postprocess = instantiate(kernel)

    @cute.jit
    def postprocess_entry(
        accum: cute.Tensor, gradient: cute.Tensor, scale: Float32, cu_seqlens: cute.Tensor | None, stream: cuda.CUstream
    ):
        postprocess(accum, gradient, scale, cu_seqlens, None, None, stream=stream)

    return postprocess_entry, arg.postprocess(kernel)
