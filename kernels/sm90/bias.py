"""A bias that is added to the scores, and the lists of tiles that it leaves to a kernel.

kernels/sm90/map_queries.py and map_keys.py make the lists: of key blocks, one for each query tile,
and of query tiles, one for each key block. A list begins with a header, three numbers of tiles:
`FREE`, whose bias is zero everywhere; `BIASED`, these and the ones that have a bias; `ALL`, these
and the last key block, if its bias is zero but the keys end within it. Behind the header are the
tiles' numbers in this order, so that each kind has a loop of its own. A kernel goes over the
positions of a list. Tiles that the bias hides are in no list, and no list is empty.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr

CELL = 64  # queries and keys of which a map tells one by one
FREE, BIASED, ALL = range(3)
HEADER = 4  # int32: the numbers above, and one to spare
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


def pair(bias: cute.Tensor, place: Int64) -> Int32:
    """Two elements of the bias, of which the first is at an even place."""
    pointer = cute.recast_ptr((bias.iterator + place).align(4), dtype=Int32)
    return cute.make_tensor(pointer, cute.make_layout(1))[0]


@cute.jit
def in_scores(value, inverse_scale: Float32) -> Float32:
    """An element of the bias as it is added to a score, which is multiplied by the scale later."""
    number = value.to(Float32)
    added = number * inverse_scale
    if const_expr(value.dtype is BFloat16):  # fp16 is far from the limit
        added = LOWEST if added < LOWEST and number > -Float32.inf else added
    return added
