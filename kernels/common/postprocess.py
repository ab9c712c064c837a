"""The kernel after a backward: it turns an fp32 accumulator, in the order that its writer stored
it, into dQ, dK or dV. Both architectures share it.

Rows of packed tensors that belong to no sequence get gradients of zero here, since a backward
always ends with this kernel: a packed buffer of a fixed size goes on behind its last sequence, and
the layer before attention sums over all rows.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, const_expr
from flash_attn.cute import flash_bwd_postprocess as upstream
from flash_attn.cute.bwd_accum_tile import AccumTileOrder
from flash_attn.cute.flash_bwd_postprocess import FlashAttentionBackwardPostprocess
from flash_attn.cute.tile_scheduler import SingleTileVarlenScheduler
from quack.cute_dsl_utils import ParamsBase

from kernels.common import packed, symbolic
from kernels.common.tile_slots import Scheduler
from kernels.kernel import Kernel, Layout


@dataclass
class Gradients(ParamsBase):
    """Gradients whose rows outside of the sequences are to be zero. dK and dV have no rows where
    another kernel clears them."""

    own: cute.Tensor  # [total, heads, head_dim], like the others; what this kernel writes
    offsets: packed.Offsets
    dk: cute.Tensor
    dv: cute.Tensor
    offsets_k: packed.Offsets


class ClearingScheduler(Scheduler):
    """Clears the rows that no tile covers in create(), which every thread of upstream's kernel
    calls before all else."""

    gradients: Gradients  # of the kernel that is being traced

    @dataclass
    class Params(ParamsBase):
        schedule: SingleTileVarlenScheduler.Params
        gradients: Gradients

    @classmethod
    def to_underlying_arguments(cls, args, **options):
        return cls.Params(Scheduler.to_underlying_arguments(args, **options), cls.gradients)

    @staticmethod
    def get_grid_shape(params, **options):
        return Scheduler.get_grid_shape(params.schedule, **options)

    @staticmethod
    def create(params, **options):
        found = params.gradients
        packed.clear_outside(found.own, found.offsets)
        packed.clear_outside(found.dk, found.offsets_k)
        packed.clear_outside(found.dv, found.offsets_k)
        return Scheduler.create(params.schedule, **options)


upstream.SingleTileVarlenScheduler = ClearingScheduler


def instantiate(kernel: Kernel) -> FlashAttentionBackwardPostprocess:
    order = AccumTileOrder.TMEM_FRAG_2CTA if kernel.two_cta else AccumTileOrder.TMEM_FRAG_1CTA
    if kernel.block_m == 64:  # the postprocess kernels of dK and dV at D 256
        order = AccumTileOrder.ROW_MAJOR
    return FlashAttentionBackwardPostprocess(
        symbolic.DTYPES[kernel.dtype], kernel.head_dim, kernel.arch, kernel.block_m, kernel.threads,
        kernel.atom_layout_m,
        kernel.swap_ab, use_2cta_instrs=kernel.two_cta, cluster_size=kernel.cluster,
        accum_order=order if kernel.arch == 100 else None,
    )  # fmt: skip


def entry(kernel: Kernel):
    postprocess = instantiate(kernel)

    @cute.jit
    def postprocess_entry(
        accum: cute.Tensor,
        gradient: cute.Tensor,
        scale: Float32,
        cu_seqlens,  # a tensor, as those that follow, or None
        dk,
        dv,
        cu_seqlens_k,
        stream: cuda.CUstream,
    ):
        if const_expr(kernel.layout is Layout.VARLEN):
            cu_seqlens = packed.Offsets(cu_seqlens, gradient.shape[0])
            ClearingScheduler.gradients = Gradients(
                gradient, cu_seqlens, dk, dv, packed.Offsets(cu_seqlens_k, dk.shape[0])
            )
        postprocess(accum, gradient, scale, cu_seqlens, None, None, stream=stream)

    return postprocess_entry, symbolic.arguments(kernel)
