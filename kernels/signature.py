"""The C signature that an object must export: kernels/arguments.py as the compiler words it.

The C++ side (csrc/core/launch/) passes an array of pointers in this order, so the build compares
what was exported with what is declared and fails on a difference.

A tensor is a struct of its address, its dynamic shapes (int32) and its dynamic strides (int64); the
innermost stride is always one.
"""

from collections.abc import Iterable

from kernels.arguments import Argument, Tensor, declared
from kernels.kernel import Kernel

C_TYPES = {"fp32": "float", "int32": "int32_t"}
STREAM = "stream: cudaStream_t"
STATUS = "ret: int32_t"  # written by the callee: a cudaError_t


def worded(argument: Argument, kernel: Kernel) -> str:
    kind = argument.kind
    if isinstance(kind, Tensor):
        modes = kind.modes_of(kernel)
        return f"{argument.name}: tensor of {modes} shapes, {modes - 1} strides"
    return f"{argument.name}: {C_TYPES[kind.dtype]}"


def expected(kernel: Kernel) -> tuple[str, ...]:
    given = (worded(argument, kernel) for argument in declared(kernel) if argument.given)
    return (*given, STREAM, STATUS)


def check(kernel: Kernel, exported: Iterable[str]) -> None:
    if tuple(exported) != expected(kernel):
        raise ValueError(
            f"kernel {kernel.name}: its object takes\n  "
            + "\n  ".join(exported)
            + "\nbut kernels/arguments.py and csrc/core/launch/ have\n  "
            + "\n  ".join(expected(kernel))
        )
