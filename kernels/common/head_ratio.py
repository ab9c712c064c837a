"""The ratio of query heads to key/value heads as a run-time value.

Upstream's kernel classes bake the ratio in, which means one object a ratio. They use it in two ways: trace-time tests against one
(`ratio == 1`, `ratio > 1`), which choose code, and arithmetic on head indices, which does not care. `AboveOne` answers the first as
a constant and does the second at run time, so one object serves every ratio.
"""

import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir.extras import types as T


class AboveOne(Int32, metaclass=type(Int32), width=32, signed=True, mlir_type=T.i32):
    """A run-time Int32 that trace-time tests take for greater than one."""

    def __eq__(self, other):
        return False if isinstance(other, int) and other == 1 else super().__eq__(other)

    def __gt__(self, other):
        return True if isinstance(other, int) and other == 1 else super().__gt__(other)

    __hash__ = None


def head_ratio(num_heads, num_heads_kv) -> Int32:
    """Query heads a key/value head, from the head counts of the tensors at hand."""
    return cute.size(num_heads) // cute.size(num_heads_kv)
