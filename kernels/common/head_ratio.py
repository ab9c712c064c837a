"""The ratio of query heads to key/value heads as a run-time value.

Upstream's kernel classes bake the ratio in, which would take one object a ratio. They use it in two
ways: trace-time tests against one (`ratio == 1`, `ratio > 1`), which choose code, and arithmetic on
head indices, which does not care. The classes here stand in for the baked integer: an Int32 whose
operators do what the kernel at hand needs, so that one object serves every ratio.
"""

# mypy: ignore-errors
# The compiler's metaclass takes keywords that no checker knows.

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.extras import types as T


class HeadRatio(Int32, metaclass=type(Int32), width=32, signed=True, mlir_type=T.i32):
    """The number of query heads that share a key/value head, any from one up, in a kernel whose
    code does not depend on it."""

    def __init__(self, num_heads, num_heads_kv):
        super().__init__(cute.size(num_heads_kv))
        self.num_heads = cute.size(num_heads)

    def __rfloordiv__(self, head_idx):
        return kv_head(head_idx, self.num_heads, Int32(self))


class AboveOne(Int32, metaclass=type(Int32), width=32, signed=True, mlir_type=T.i32):
    """A ratio that trace-time tests take for greater than one."""

    def __eq__(self, other):
        return False if isinstance(other, int) and other == 1 else super().__eq__(other)

    def __gt__(self, other):
        return True if isinstance(other, int) and other == 1 else super().__gt__(other)

    __hash__ = None


def head_ratio(num_heads, num_heads_kv) -> Int32:
    """The number of query heads that share a key/value head, from the head counts of the tensors
    at hand."""
    return cute.size(num_heads) // cute.size(num_heads_kv)


@cute.jit
def kv_head(head_idx: Int32, num_heads: Int32, num_heads_kv: Int32) -> Int32:
    """The key/value head that a query head reads.

    A producer's first load waits for it, and two integer divisions there cost 3% of a short
    forward. In floating point it is exact for up to 65535 heads, a grid's bound: half a head from
    the next integer, where the products are off by a thirtieth at most.
    """
    result = head_idx
    if num_heads != num_heads_kv:
        inverse_ratio = Float32(num_heads_kv) * cute.arch.rcp_approx(Float32(num_heads))
        result = Int32((Float32(head_idx) + 0.5) * inverse_ratio)
    return result
