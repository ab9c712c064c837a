"""The SM100 forward of few queries: Hopper's kernel (kernels/sm90/decode.py), with the products of
one warp.

Its time is that of loading keys and values, to which the products add little: those of one warp,
mma.sync, take the operands that WGMMA takes from shared memory, and leave the sums in the same
registers. tcgen05 would leave them in tensor memory, and has 128 rows at least.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.nvgpu import warp
from flash_attn.cute import ampere_helpers, utils
from quack import layout_utils

from kernels.common import symbolic
from kernels.kernel import Kernel
from kernels.sm90 import decode
from kernels.sm90.decode import CONSUMER_WARPS, Shared
from kernels.sm90.staging import Load


class Products(NamedTuple):
    """The operands in shared memory, and the accumulators."""

    mma_qk: cute.TiledMma
    mma_pv: cute.TiledMma
    q: cute.Tensor
    k: cute.Tensor  # stages of it
    weights: cute.Tensor  # stages of P
    v: cute.Tensor  # stages of V^T
    scores: cute.Tensor  # S^T of a key block
    outputs: cute.Tensor  # O^T


class Decode(decode.Decode):
    def tiled_mmas(self) -> tuple[cute.TiledMma, cute.TiledMma]:
        """Each warp has 16 of 64 rows, keys of S^T and columns of V. What is loaded at a time for a
        product's other operand is 16 of its columns."""
        mma = cute.make_tiled_mma(
            warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16)),
            (CONSUMER_WARPS, 1, 1),
            permutation_mnk=(16 * CONSUMER_WARPS, 16, 16),
        )
        return mma, mma

    def products(self, shared: Shared, k: Load, v: Load, mma_qk, mma_pv) -> Products:
        scores, outputs = (
            cute.make_rmem_tensor(mma.get_slice(0).partition_shape_C((rows, self.tile_m)), Float32)
            for mma, rows in ((mma_qk, self.tile_n), (mma_pv, self.head_dim_v))
        )
        v_transposed = layout_utils.transpose_view(v.stages)
        return Products(
            mma_qk, mma_pv, shared.q, k.stages, shared.weights, v_transposed, scores, outputs
        )

    def issue_scores(self, products: Products, stage):
        products.scores.fill(0.0)
        multiply(
            products.mma_qk, products.scores, products.k[None, None, stage], products.q,
            transposed=False,
        )  # fmt: skip

    def issue_outputs(self, products: Products, stage, weights):
        multiply(
            products.mma_pv, products.outputs, products.v[None, None, stage],
            products.weights[None, None, weights], transposed=True,
        )  # fmt: skip

    def wait(self, under_way: int):
        """A warp's products are done when the next instruction reads them."""


def multiply(mma: cute.TiledMma, sums: cute.Tensor, a: cute.Tensor, b: cute.Tensor, transposed):
    """Adds A B^T to the sums. `transposed`: the rows of A lie side by side in shared memory."""
    thread, _, _ = cute.arch.thread_idx()
    of_thread = mma.get_slice(thread)
    load_a, load_b = (
        tiled_copy(
            cute.make_copy_atom(
                warp.LdMatrix8x8x16bOp(transpose=transpose, num_matrices=4), a.element_type
            ),
            mma,
        ).get_slice(thread)
        for tiled_copy, transpose in (
            (utils.make_tiled_copy_A, transposed),
            (utils.make_tiled_copy_B, False),
        )
    )
    ampere_helpers.gemm(
        mma,
        sums,
        of_thread.make_fragment_A(of_thread.partition_A(a)),
        of_thread.make_fragment_B(of_thread.partition_B(b)),
        load_a.partition_S(a),
        load_b.partition_S(b),
        load_a,
        load_b,
    )


def entry(kernel: Kernel):
    return Decode(kernel), symbolic.arguments(kernel)
