"""A bias that is added to the scores, and the lists of tiles that it leaves to a kernel.

kernels/sm90/map_queries.py and map_keys.py make the lists: of key blocks, one for each query tile,
and of query tiles, one for each key block. Tiles that the bias hides are in no list, and no list is
empty. A list begins with a header, four numbers of tiles:

    FREE     those whose bias is zero everywhere
    BIASED   these, and those with a bias that may be added as it is
    CAREFUL  these, and those with a bias in which the keys end, or beside which scores are nothing:
             2^20 or more, or for a query that sees no key elsewhere -2^20 or less
    ALL      these, and the last key block, if its bias is zero but the keys end within it

Behind the header are the tiles' numbers in this order, so that each kind has a loop of its own. A
kernel goes over the positions of a list.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr
from cutlass._mlir.dialects import nvvm
from cutlass.cutlass_dsl import dsl_user_op

CELL = 64  # queries and keys of which a map tells one by one
FREE, BIASED, CAREFUL, ALL = range(4)
HEADER = 4  # int32: the numbers above
# The least that a finite bias adds to a score. Divided by the scale it might become minus infinity,
# and a query whose keys are all at minus infinity sees nothing.
LOWEST = -3.0e38


class Bias(NamedTuple):
    """What a kernel with a bias takes in place of a window's bounds."""

    bias: cute.Tensor  # [batch, heads, queries, keys]
    lists: cute.Tensor  # [batch, heads, lists, HEADER + tiles]
    inverse_scale: Float32


def entry(lists: cute.Tensor, batch, head, index, position) -> Int32:
    """The number of a tile, which is at a position of a list."""
    return lists[batch, head, index, HEADER + position]


def row_of(bias: cute.Tensor, batch, head, row) -> Int64:
    """Where a row of the bias begins, in elements."""
    return Int64(cute.crd2idx((batch, head, row, 0), bias.layout))


def pairs(bias: cute.Tensor, offset: Int64, count: int = 1, step: int = 1) -> cute.Tensor:
    """Elements of the bias, two in a word, from an even offset on: every `step` words one."""
    pointer = cute.recast_ptr((bias.iterator + offset).align(4), dtype=Int32)
    return cute.make_tensor(pointer, cute.make_layout(count, stride=step))


@dsl_user_op
def prefetch(bias: cute.Tensor, offset: Int64, *, loc=None, ip=None) -> None:
    """Brings the 32 bytes around an element of the bias to L2."""
    address = (bias.iterator + offset).to_llvm_ptr(loc=loc, ip=ip)
    nvvm.prefetch(address, cache_level=nvvm.PrefetchCacheLevel.L2, loc=loc, ip=ip)


@cute.jit
def added(score: Float32, element, inverse_scale: Float32, careful: cutlass.Constexpr) -> Float32:
    """A score and an element of the bias. The sum is multiplied by the scale later. `careful`: no
    finite element makes it minus infinity."""
    number = element.to(Float32)
    if const_expr(not careful or element.dtype is not BFloat16):  # fp16 is far from the limit
        return number * inverse_scale + score
    change = number * inverse_scale
    return score + (LOWEST if change < LOWEST and number > -Float32.inf else change)
