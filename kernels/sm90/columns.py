"""The softmax of scores whose rows are keys and whose columns are queries: of one warpgroup, key
block by key block.

Each of its threads has some keys of some columns. A column's reference is that of the whole
warpgroup, its total that of the thread's own keys.
"""

from collections.abc import Callable
from operator import add
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from cutlass._mlir.dialects import nvvm
from cutlass.cutlass_dsl import T, dsl_user_op
from quack import layout_utils

from kernels.sm90.barriers import Barrier
from kernels.sm90.softmax import LAZY

THREADS = 128  # of the warpgroup
WARPS = THREADS // 32
# The lanes of a warp with the same remainder of division by 4 have the same columns.
COLUMN_LANES = 4


class Softmax(NamedTuple):
    scale_log2: Float32
    where: cute.Tensor  # [columns, keys] of the thread: each score's (key, column) in the tile
    reference: cute.Tensor  # a column's, times scale_log2: the base of its weights
    total: cute.Tensor
    largest: cute.Tensor  # of the thread's scores in a key block
    shared: cute.Tensor  # a number for each warp and column

    @classmethod
    def create(cls, scale_log2: Float32, where: cute.Tensor, shared: cute.Tensor):
        count = cute.size(where, mode=[0])
        numbers = (cute.make_rmem_tensor(count, Float32) for _ in range(3))
        return cls(scale_log2, where, *numbers, shared)

    def begin(self):
        self.reference.fill(-Float32.inf)
        self.total.fill(0.0)


def sync():
    cute.arch.barrier(barrier_id=Barrier.WARPGROUP_1, number_of_threads=THREADS)


@dsl_user_op
def any_of_warpgroup(condition: Boolean, *, loc=None, ip=None) -> Boolean:
    """Waits for all threads. Returns whether the condition holds for any of them."""
    held = nvvm.barrier_cta_red(
        Boolean(condition).ir_value(loc=loc, ip=ip),
        Int32(Barrier.WARPGROUP_1).ir_value(loc=loc, ip=ip),
        nvvm.BarrierReduxKind.OR,
        thread_count=Int32(THREADS).ir_value(loc=loc, ip=ip),
        aligned=True,
        results=[T.i32()],
        loc=loc,
        ip=ip,
    )
    return Int32(held) != 0


@cute.jit
def reduce(numbers: cute.Tensor, operation: cutlass.Constexpr[Callable], softmax: Softmax):
    """Replaces each thread's number of a column by the one of all keys."""
    thread, _, _ = cute.arch.thread_idx()
    warp, lane = thread // 32, thread % 32
    for r in cutlass.range_constexpr(cute.size(numbers)):
        number = numbers[r]
        for offset in (4, 8, 16):
            number = operation(number, cute.arch.shuffle_sync_bfly(number, offset=offset))
        numbers[r] = number
    if lane < COLUMN_LANES:
        for r in cutlass.range_constexpr(cute.size(numbers)):
            softmax.shared[warp, softmax.where[r, 0][1]] = numbers[r]
    sync()
    for r in cutlass.range_constexpr(cute.size(numbers)):
        number = softmax.shared[0, softmax.where[r, 0][1]]
        for w in cutlass.range_constexpr(1, WARPS):
            number = operation(number, softmax.shared[w, softmax.where[r, 0][1]])
        numbers[r] = number


@cute.jit
def exceed(scores: cute.Tensor, softmax: Softmax) -> Boolean:
    """Whether a score of the thread exceeds its column's reference by so much that the reference
    must change. It does from no reference on."""
    scores = layout_utils.reshape_acc_to_mn(scores, transpose=True)
    found = Boolean(False)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        largest = scores[r, 0]
        for c in cutlass.range_constexpr(1, cute.size(scores, mode=[1])):
            largest = cute.arch.fmax(largest, scores[r, c])
        softmax.largest[r] = largest
        found = found or largest * softmax.scale_log2 - softmax.reference[r] > LAZY
    return found


@cute.jit
def base(reference: Float32) -> Float32:
    """What is subtracted from a column's scores: the reference, but nothing in a column that has
    seen no key."""
    return Float32(0.0) if reference == -Float32.inf else reference


@cute.jit
def raise_references(softmax: Softmax, outputs: cute.Tensor):
    """Takes the largest scores for references where they exceed these, and rescales the sums so
    far."""
    outputs = layout_utils.reshape_acc_to_mn(outputs, transpose=True)
    reduce(softmax.largest, cute.arch.fmax, softmax)
    for r in cutlass.range_constexpr(cute.size(softmax.reference)):
        before, largest = softmax.reference[r], softmax.largest[r] * softmax.scale_log2
        reference = largest if largest - before > LAZY else before
        softmax.reference[r] = reference
        factor = cute.math.exp2(before - base(reference), fastmath=True)
        softmax.total[r] = softmax.total[r] * factor
        outputs[r, None].store(outputs[r, None].load() * factor)


@cute.jit
def exponentials(scores: cute.Tensor, softmax: Softmax):
    """Replaces the scores by their exponentials, and adds these to the totals."""
    scores = layout_utils.reshape_acc_to_mn(scores, transpose=True)
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        subtracted = base(softmax.reference[r])
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            weight = cute.math.exp2(scores[r, c] * softmax.scale_log2 - subtracted, fastmath=True)
            softmax.total[r] = softmax.total[r] + weight
            scores[r, c] = weight


def add_up(softmax: Softmax):
    """Makes the totals those of all keys, in all threads."""
    reduce(softmax.total, add, softmax)
