"""A process that compiles kernels for one architecture, one after the other.

Importing the compiler takes seconds and compiling a kernel about one, so a process compiles many.
The compiler reads its target from the environment when it is imported, so each architecture has its
own process.

Reads a request a line from standard input: {"kernel": {...}, "directory": path}. Leaves the object
there and answers on standard output with the facts about it, or {"error": message} when the
compiler failed. What else is printed goes to standard error.
"""

import json
import os
import re
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path

from kernels import cubin, header
from kernels.kernel import Kernel, Layout, Mask, Op

OBJECT = "kernel.o"

# Generic x86-64: by default the compiler takes the building machine's instructions (AVX-512) for
# the host code too.
HOST_TARGET = "llvm -mtriple=x86_64-unknown-linux-gnu -mcpu=x86-64"

# The runtime shims that csrc/core/launch/dialect_runtime.cpp defines, and what the linker does.
PROVIDED = {
    "_GLOBAL_OFFSET_TABLE_", "_cuKernelGetAttribute", "_cudaDeviceGetAttribute",
    "_cudaFuncSetAttribute", "_cudaGetDevice",
    "_cudaKernelSetAttributeForDevice", "_cudaLaunchKernelEx", "_cudaLibraryGetKernel",
    "_cudaLibraryLoadData",
}  # fmt: skip


def from_json(spec: dict) -> Kernel:
    return Kernel(
        **{
            **spec,
            "op": Op(spec["op"]),
            "layout": Layout(spec["layout"]),
            "mask": Mask(spec["mask"]),
        }
    )


def entry(kernel: Kernel):
    return import_module(f"kernels.{kernel.module.replace('/', '.')}").entry(kernel)


def check_toolkit() -> None:
    """Fails where the compiler is not its build for CUDA 13. The compiler takes the newest build
    that this machine's driver, if any, runs."""
    from cutlass._mlir._mlir_libs import _cutlass_ir

    if ".cu13." not in Path(_cutlass_ir.__file__).name:
        raise RuntimeError(
            f"the kernel compiler loaded {_cutlass_ir.__file__}, not its build for CUDA 13: "
            "compile where "
            "nvidia-cutlass-dsl[cu13] is installed and the CUDA driver is for CUDA 13 (580 or "
            "newer), or where there is no driver"
        )


def dynamic_shared_bytes(ir: str) -> int:
    """Reads the third field of the launch configuration, a constant, from the host code. The object
    holds it as an instruction only."""
    config = r"!llvm\.struct<\(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32\)>"
    stores = re.findall(
        rf"(%\d+) = llvm\.getelementptr %\d+\[0, 2\] : [^\n]*{config}\n\s*llvm\.store (%\d+), \1 : "
        r"i64",
        ir,
    )
    if len(stores) != 1:
        raise ValueError(f"host code launches {len(stores)} kernels, expected 1")
    ((pointer, value),) = stores
    before, _, _ = ir.partition(f"llvm.store {value}, {pointer} : i64")
    constants = re.findall(rf"{value} = llvm\.mlir\.constant\((\d+) : i64\)", before)
    return int(constants[-1])


def compile_kernel(kernel: Kernel, directory: Path) -> dict:
    import cutlass.cute as cute

    check_toolkit()
    function, arguments = entry(kernel)
    compiled = cute.compile(function, *arguments, options=f"--host-target '{HOST_TARGET}'")
    compiled.export_to_c(
        file_path=str(directory), file_name=Path(OBJECT).stem, function_prefix=kernel.name
    )

    exports = header.parse((directory / OBJECT).with_suffix(".h").read_text(), kernel.name)
    elf = (directory / OBJECT).read_bytes()
    if unknown := set(cubin.undefined(elf)) - PROVIDED:
        raise ValueError(
            f"object needs symbols that nothing provides: {', '.join(sorted(unknown))}"
        )
    needs = cubin.resources(cubin.extract(elf))
    if needs.arch != kernel.arch:
        raise ValueError(f"device code is for sm_{needs.arch}, expected sm_{kernel.arch}")
    if needs.static_shared_bytes > cubin.RESERVED_SHARED_BYTES:
        raise ValueError(
            f"device code holds {needs.static_shared_bytes} bytes of static shared memory, "
            "expected none"
        )
    return {
        "load": exports.load,
        "load_to_device": exports.load_to_device,
        "launch": exports.launch,
        "arguments": exports.arguments,
        "registers": needs.registers,
        "spill_bytes": needs.spill_bytes,
        "products": needs.products,
        "waits": needs.waits,
        "shared_memory_bytes": dynamic_shared_bytes(str(compiled.ir_module)),
        "object_bytes": len(elf),
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = compile_kernel(from_json(request["kernel"]), Path(request["directory"]))
        except Exception:  # whatever the compiler raises is the answer
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
