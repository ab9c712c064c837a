"""The SM100 forward: flash-attn-4's kernel class behind a flat entry."""

from collections.abc import Iterable

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from flash_attn.cute import flash_fwd_sm100 as upstream
from flash_attn.cute.flash_fwd_sm100 import FlashAttentionForwardSm100
from flash_attn.cute.tile_scheduler import StaticPersistentTileScheduler

from kernels.common import packed, symbolic
from kernels.common.head_ratio import HeadRatio
from kernels.common.pages import Table
from kernels.kernel import Kernel, Layout, Mask
from kernels.sm100.pages import Cache, PagedKeys, PagedRows, as_rows, layout_of
from kernels.sm100.sequences import IndexedRows, KeysInUse, Rows, block_to_load, telling

upstream.assume_tensor_aligned = packed.assume_tensor_aligned
upstream.SingleTileVarlenScheduler = packed.Scheduler

BLOCK_M = 128  # rows of one query tile; a kernel of 256 rows keeps two in flight


class PersistentTileScheduler(StaticPersistentTileScheduler):
    """A scheduler that takes the number of SMs at run time; upstream's asks the machine that
    compiles."""

    sm_count: Int32

    @classmethod
    def get_grid_shape(cls, params, **_):
        clusters = cutlass.min(cls.sm_count // params.cluster_shape_m, params.total_blocks_cluster)
        return clusters * params.cluster_shape_m, Int32(1), Int32(1)


class Forward(FlashAttentionForwardSm100):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # head_dim may be any multiple of 8 below the bucket
        self.check_hdim_oob = self.check_hdim_v_oob = True
        if self.TileScheduler is StaticPersistentTileScheduler:
            self.TileScheduler = PersistentTileScheduler

    def load(self, thr_mma_qk, thr_mma_pv, mQ, mK, *args, **kwargs):
        self.qhead_per_kvhead = HeadRatio(mQ.shape[2], mK.shape[2])
        super().load(thr_mma_qk, thr_mma_pv, mQ, mK, *args, **kwargs)
        self.qhead_per_kvhead = 1


class VarlenForward(Forward):
    """Knows which keys are in use, sequence by sequence; its keys and values are those of
    `packed.sequences`."""

    def load(self, thr_mma_qk, thr_mma_pv, mQ, mK, mV, *args, **kwargs):
        mK, mV = IndexedRows(mK, 0, of_keys=True), IndexedRows(mV, 1, of_keys=True)
        args = with_keys_in_use(args, mK, mV)
        super().load(thr_mma_qk, thr_mma_pv, mQ, mK, mV, *args, **kwargs)

    def mma(self, *args, **kwargs):
        super().mma(*with_keys_in_use(args), **kwargs)

    def softmax_loop(self, *args, **kwargs):
        names, values = zip(*kwargs.items(), strict=True)
        super().softmax_loop(*args, **dict(zip(names, with_keys_in_use(values), strict=True)))

    def correction_loop(self, *args, **kwargs):
        super().correction_loop(*with_keys_in_use(args), **kwargs)

    def epilogue_s2g(self, *args, **kwargs):
        super().epilogue_s2g(*with_keys_in_use(args), **kwargs)

    def load_KV(self, *args, block, **kwargs):
        super().load_KV(*args, block=block_to_load(block), **kwargs)


class PagedForward(VarlenForward):
    """Loads key blocks from pages."""

    def load(self, thr_mma_qk, thr_mma_pv, mQ, mK, mV, *args, **kwargs):
        (lengths,) = filter(packed.makes_lengths, args)
        paged = lengths.keywords["mSeqUsedK"]
        mK, mV = (
            PagedRows(mK, 0, paged.k, paged.table),
            PagedRows(mV, 1, paged.v, paged.table),
        )
        self.rows = {"K": mK, "V": mV}
        args = with_keys_in_use(args, mK, mV)
        Forward.load(self, thr_mma_qk, thr_mma_pv, mQ, mK, mV, *args, **kwargs)

    @cute.jit
    def load_KV(
        self, tma_atom, tXgX, tXsX, paged_kv_manager, sX, block, pipeline_kv, producer_state,
        K_or_V, page_idx=None,
    ):  # fmt: skip
        index, phase = producer_state.index, producer_state.phase
        extra = self.tma_copy_bytes[K_or_V] - self.tma_copy_bytes["K"]
        pipeline_kv.producer_acquire(producer_state, extra_tx_count=extra)
        if const_expr(K_or_V == "K" and self.uneven_kv_smem) and index == 0:
            # The keys go into part of the next stage, which must be free as well.
            pipeline_kv.sync_object_empty.wait(1, phase)
        stage = self.offset_kv_smem(sX[None, None, None, index], index, phase ^ 1)
        columns = self.head_dim_padded if const_expr(K_or_V == "K") else self.head_dim_v_padded
        layout = layout_of(stage.element_type, self.n_block_size, columns)
        self.rows[K_or_V].source.load(
            block_to_load(block),
            cute.make_tensor(stage.iterator, layout.outer),
            pipeline_kv.producer_get_barrier(producer_state),
        )


def with_keys_in_use(arguments: Iterable, *tensors: Rows) -> list:
    """A method's arguments, with SeqlenInfoQK.create replaced by KeysInUse.create, which knows the
    keys in use."""
    return [telling(argument, *tensors, create=KeysInUse.create) for argument in arguments]


KINDS = {Layout.DENSE: Forward, Layout.VARLEN: VarlenForward, Layout.PAGED: PagedForward}


def instantiate(kernel: Kernel) -> Forward:
    q_stage = kernel.block_m // BLOCK_M
    single_tile = q_stage == 1 and not kernel.two_cta
    unmasked = kernel.mask is Mask.FULL and kernel.layout is Layout.DENSE
    return KINDS[kernel.layout](
        kernel.head_dim,
        kernel.head_dim_v,
        qhead_per_kvhead=1,
        is_causal=kernel.mask is Mask.CAUSAL,
        is_local=kernel.mask is Mask.WINDOW,
        is_split_kv=False,
        pack_gqa=False,
        m_block_size=BLOCK_M,
        n_block_size=kernel.block_n,
        q_stage=q_stage,
        # A static persistent grid pays where tiles are alike: no mask on a dense batch, or one
        # query tile a sequence.
        is_static_persistent=single_tile or unmasked,
        is_varlen_q=kernel.packed,
        use_2cta_instrs=kernel.two_cta,
        use_clc_scheduler=False,
        use_s_ping_pong=q_stage == 1 and kernel.head_dim == kernel.head_dim_v,
    )


def entry(kernel: Kernel):
    forward = instantiate(kernel)

    @cute.jit
    def forward_entry(
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        o: cute.Tensor,
        lse: cute.Tensor,
        scale: Float32,
        cu_seqlens_q: cute.Tensor | None,
        key_lengths: cute.Tensor | None,
        window_size_left: Int32,
        window_size_right: Int32,
        max_seqlen_q: Int32,
        sm_count: Int32,
        cu_seqlens_k: cute.Tensor | None,
        seqused_k: cute.Tensor | None,
        block_table: cute.Tensor | None,
        stream: cuda.CUstream,
    ):
        window = (
            (window_size_left, window_size_right) if kernel.mask is Mask.WINDOW else (None, None)
        )
        PersistentTileScheduler.sm_count = sm_count
        if const_expr(kernel.packed):
            cu_seqlens_q = packed.Offsets(cu_seqlens_q, q.shape[0])
            if const_expr(kernel.layout is Layout.PAGED):
                table = Table(block_table, cu_seqlens_k, seqused_k, k.shape[1])
                key_lengths = PagedKeys(table, Cache.of(k), Cache.of(v))
                k, v = as_rows(k), as_rows(v)
            else:
                key_lengths = packed.KeyLengths(key_lengths, k.shape[0])
            k, v = packed.sequences(k), packed.sequences(v)
        forward(
            q, k, v, o, lse, scale, cu_seqlens_q, mSeqUsedK=key_lengths, window_size_left=window[0],
            window_size_right=window[1],
            max_seqlen_q=max_seqlen_q, stream=stream,
        )  # fmt: skip

    return forward_entry, symbolic.arguments(kernel)
