"""SM90 forward: flash-attn-4's kernel class behind a flat entry."""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from flash_attn.cute import flash_fwd_sm90 as upstream
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90

from kernels.common import arguments as arg
from kernels.common import keys_in_use
from kernels.common.head_ratio import HeadRatio
from kernels.matrix import Kernel, Layout, Mask

upstream.assume_tensor_aligned = keys_in_use.assume_tensor_aligned


class Forward(FlashAttentionForwardSm90):
    def load(self, mQ, mK, *args, **kwargs):
        self.qhead_per_kvhead = HeadRatio(mQ.shape[2], mK.shape[2])
        super().load(mQ, mK, *args, **kwargs)
        self.qhead_per_kvhead = 1


class VarlenForward(Forward):
    def load(self, *args, **kwargs):
        super().load(*keys_in_use.with_keys_in_use(args), **kwargs)

    def mma(self, *args, **kwargs):
        super().mma(*keys_in_use.with_keys_in_use(args), **kwargs)

    def load_KV(self, *args, block, **kwargs):
        super().load_KV(*args, block=keys_in_use.block_to_load(block), **kwargs)


def instantiate(kernel: Kernel) -> Forward:
    kind = VarlenForward if kernel.layout is Layout.VARLEN else Forward
    return kind(
        arg.DTYPES[kernel.dtype], kernel.head_dim, kernel.head_dim_v, 1,
        is_causal=kernel.mask is Mask.CAUSAL, is_local=kernel.mask is Mask.WINDOW, pack_gqa=False,
        tile_m=kernel.block_m, tile_n=kernel.block_n, num_stages=2, num_threads=384, Q_in_regs=False,
        intra_wg_overlap=True, mma_pv_is_rs=kernel.pv_in_registers, mask_mod=None, score_mod=None, has_aux_tensors=False,
    )  # fmt: skip


def entry(kernel: Kernel):
    forward = instantiate(kernel)

    @cute.jit
    def forward_entry(
        q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, o: cute.Tensor, lse: cute.Tensor, scale: Float32,
        cu_seqlens_q: cute.Tensor | None, key_lengths: cute.Tensor | None,
        window_size_left: Int32, window_size_right: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        window = (window_size_left, window_size_right) if kernel.mask is Mask.WINDOW else (None, None)
        if const_expr(kernel.layout is Layout.VARLEN):
            k, v = keys_in_use.sequences(k), keys_in_use.sequences(v)
        forward(
            q, k, v, o, lse, scale, cu_seqlens_q, mSeqUsedK=key_lengths,
            window_size_left=window[0], window_size_right=window[1], stream=stream,
        )  # fmt: skip

    return forward_entry, arg.forward(kernel)
