"""Writes zeros where PyTorch's own backward over packed sequences writes no gradient.

PyTorch's kernel leaves alone the rows that belong to no sequence, and dK and dV of a sequence
without queries. Our backward writes both, and a speed rule may only choose between kernels whose
results are the same.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32

from kernels.common import packed, symbolic
from kernels.kernel import Kernel

THREADS = 256  # a row of 16 heads of 128 elements is one vector of 16 bytes for each


class Clear:
    @cute.jit
    def __call__(
        self,
        dq: cute.Tensor,
        dk: cute.Tensor,
        dv: cute.Tensor,
        cu_seqlens_q: cute.Tensor,
        cu_seqlens_k: cute.Tensor,
        num_ctas: Int32,
        stream: cuda.CUstream,
    ):
        offsets_q, offsets_k = (
            packed.Offsets(cu_seqlens_q, dq.shape[0]),
            packed.Offsets(cu_seqlens_k, dk.shape[0]),
        )
        self.kernel(dq, dk, dv, offsets_q, offsets_k).launch(
            grid=[num_ctas, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        dq: cute.Tensor,
        dk: cute.Tensor,
        dv: cute.Tensor,
        offsets_q: packed.Offsets,
        offsets_k: packed.Offsets,
    ):
        packed.clear_outside(dq, offsets_q)
        packed.clear_outside(dk, offsets_k)
        packed.clear_outside(dv, offsets_k)
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        for sequence in cutlass.range(cta, offsets_q.shape[0] - 1, num_ctas, unroll=1):
            if offsets_q[sequence + 1] <= offsets_q[sequence]:
                first, last = offsets_k[sequence], offsets_k[sequence + 1]
                packed.clear_rows(dk, first, last, Int32(0), Int32(1))
                packed.clear_rows(dv, first, last, Int32(0), Int32(1))


def entry(kernel: Kernel):
    return Clear(), symbolic.arguments(kernel)
