"""The softmax of one warpgroup's rows, key block by key block."""

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32
from flash_attn.cute import utils
from quack import layout_utils

# A row's reference, which is subtracted before exp2, stays until a score exceeds it by 8, in powers
# of 2: weights up to 256 lose nothing in either dtype, and most blocks need no rescale of O, which
# costs as much as the sum of the weights.
LAZY = 8.0
LOG2_E = math.log2(math.e)


class Softmax(NamedTuple):
    """The softmax of a thread's two rows so far."""

    scale_log2: Float32
    reference: cute.Tensor
    total: cute.Tensor  # of the thread's own columns
    rescale: cute.Tensor  # what the sums so far must be multiplied by

    @classmethod
    def create(cls, scale_log2: Float32):
        return cls(scale_log2, *(cute.make_rmem_tensor(2, Float32) for _ in range(3)))

    def begin(self):
        self.reference.fill(-Float32.inf)
        self.total.fill(0.0)


@cute.jit
def exponentials(scores, softmax: Softmax, large: cutlass.Constexpr = False) -> Boolean:
    """Replaces the scores by their exponentials. Returns whether any row's older sums must be
    rescaled. `large`: scores may be so large, of either sign, that their product with the scale,
    rounded, says nothing of their distance to the reference; so this is subtracted first."""
    scores = layout_utils.reshape_acc_to_mn(scores)
    scale = softmax.scale_log2
    for r in cutlass.range_constexpr(2):
        row = scores[r, None].load()
        before = softmax.reference[r]
        largest = cute.arch.warp_reduction_max(utils.fmax_reduce(row, before), threads_in_group=4)
        largest = before if (largest - before) * scale <= LAZY else largest
        softmax.reference[r] = largest
        base = Float32(0.0) if largest == -Float32.inf else largest
        softmax.rescale[r] = cute.math.exp2((before - base) * scale, fastmath=True)
        exponents = (row - base) * scale if large else row * scale - base * scale
        weights = cute.math.exp2(exponents, fastmath=True)
        softmax.total[r] = utils.fadd_reduce(weights, softmax.total[r] * softmax.rescale[r])
        scores[r, None].store(weights)
    # A total is never negative; testing it makes the vote depend on the last exponential, so that
    # the compiler places it after that. Without the test D 64 was 2% slower.
    unlike = (
        softmax.rescale[0] != 1.0
        or softmax.rescale[1] != 1.0
        or softmax.total[0] < 0.0
        or softmax.total[1] < 0.0
    )
    return cute.arch.vote_any_sync(unlike)


@cute.jit
def rescale(acc_o, factors, needed):
    if needed:
        outputs = layout_utils.reshape_acc_to_mn(acc_o)
        for r in cutlass.range_constexpr(2):
            outputs[r, None].store(outputs[r, None].load() * factors[r])
