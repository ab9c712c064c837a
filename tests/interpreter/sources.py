"""The PTX of a built kernel. Objects hold machine code only, so it is compiled once more, and must
come out the same."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from built import device_code

from kernels import cubin, pool
from kernels.kernel import Kernel, Op
from kernels.matrix import companions, matrix
from kernels.worker import OBJECT, compile_kernel

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "build" / "tests" / "ptx"


def digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()


def ptx(kernel: Kernel) -> Path:
    """In a file of its own, kept for the next test."""
    code = device_code(kernel)
    directory = DIRECTORY / f"{kernel.name}-{digest(code)[:16]}"
    kept = directory / "kernel.ptx"
    if kept.exists():
        return kept
    directory.mkdir(parents=True, exist_ok=True)
    settings = pool.environment(kernel.arch) | {"CUTE_DSL_KEEP_PTX": "1"}
    settings["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), settings["PYTHONPATH"]])
    command = [sys.executable, "-m", "interpreter.sources", kernel.name]
    done = subprocess.run(
        command, cwd=directory, env=settings, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"{kernel.name} was not compiled: {done.stderr}")
    if cubin.extract((directory / OBJECT).read_bytes()) != code:
        raise RuntimeError(f"{kernel.name}, compiled once more, is not what was built")
    (written,) = directory.glob("*.ptx")
    return written.rename(kept)


def programs(*kernels: Kernel) -> dict[str, str]:
    """The PTX files of these kernels and of those that they launch, by the digest of the device
    code.

    What is missing is compiled, on every core.
    """
    launched = (
        one for kernel in kernels if kernel.op is Op.BACKWARD for one in companions(kernel).present
    )
    needed = list(dict.fromkeys((*kernels, *launched)))
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        files = list(workers.map(ptx, needed))
    return {
        digest(device_code(kernel)): str(file) for kernel, file in zip(needed, files, strict=True)
    }


if __name__ == "__main__":
    compile_kernel(next(kernel for kernel in matrix() if kernel.name == sys.argv[1]), Path.cwd())
