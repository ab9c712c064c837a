"""The symbolic arguments that an entry is compiled for, made from kernels/arguments.py.

What is symbolic is a run-time value of the object: batch, lengths, heads, head_dim (a multiple of 8
up to the bucket) and every stride but the last mode's.
"""

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32
from quack.compile_utils import make_fake_tensor

from kernels.arguments import Argument, Scalar, declared
from kernels.kernel import Kernel

DTYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32, "int32": Int32}


def symbolic(argument: Argument, kernel: Kernel):
    """A scalar, a tensor, or None where the argument is not given."""
    kind = argument.kind
    if not argument.given:
        return None
    if isinstance(kind, Scalar):
        return DTYPES[kind.dtype](0)
    outer = (cute.sym_int() for _ in range(kind.modes_of(kernel) - 1))
    shape = (*outer, cute.sym_int(divisibility=kind.align_last))
    return make_fake_tensor(DTYPES[kind.dtype or kernel.dtype], shape, divisibility=kind.align)


def arguments(kernel: Kernel) -> tuple:
    """What an entry is called with, in the order of its parameters."""
    found = (symbolic(argument, kernel) for argument in declared(kernel))
    return (*found, cute.runtime.make_fake_stream())
