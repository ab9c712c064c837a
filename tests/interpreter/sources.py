"""Returns the PTX of a built kernel. Objects hold machine code only, so it is compiled once more,
and must come out the same."""

import hashlib
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from built import device_code
from filelock import FileLock

from kernels import cubin, pool
from kernels.kernel import ARCHS, Kernel
from kernels.matrix import companions, matrix
from kernels.worker import OBJECT, compile_kernel

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "build" / "tests" / "ptx"


def compiling() -> FileLock:
    """Returns the lock of the process that compiles what is missing."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    return FileLock(DIRECTORY / "lock")


def digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()


def _directory(kernel: Kernel) -> Path:
    """Returns the folder that keeps the PTX of a kernel as it is built, for this test and the
    next."""
    return DIRECTORY / f"{kernel.name}-{digest(device_code(kernel))[:16]}"


def _ptx(kernel: Kernel) -> Path:
    return _directory(kernel) / "kernel.ptx"


def _compile(kernels: list[Kernel]) -> None:
    """Leaves the PTX of kernels of one architecture in their folders. One process compiles them
    all, because importing the compiler takes longer than compiling a kernel."""
    settings = pool.environment(kernels[0].arch) | {"CUTE_DSL_KEEP_PTX": "1"}
    settings["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), settings["PYTHONPATH"]])
    command = [sys.executable, "-m", "interpreter.sources", *(kernel.name for kernel in kernels)]
    with tempfile.TemporaryDirectory(dir=DIRECTORY) as folder:
        done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    if done.returncode:
        names = ", ".join(kernel.name for kernel in kernels)
        raise RuntimeError(f"one of these kernels was not compiled: {names}\n{done.stderr}")


def programs(*kernels: Kernel) -> dict[str, str]:
    """Returns the PTX files of these kernels and of those that they launch, by the digest of the
    device code.

    What is missing is compiled, on every core.
    """
    launched = (one for kernel in kernels for one in companions(kernel).present)
    needed = list(dict.fromkeys((*kernels, *launched)))
    missing = [kernel for kernel in needed if not _ptx(kernel).exists()]
    cores = os.cpu_count()
    shares = [
        share
        for arch in ARCHS
        for first in range(cores)
        if (share := [kernel for kernel in missing if kernel.arch == arch][first::cores])
    ]
    with ThreadPoolExecutor(cores) as workers:
        list(workers.map(_compile, shares))
    return {digest(device_code(kernel)): str(_ptx(kernel)) for kernel in needed}


def _write(kernel: Kernel) -> None:
    directory = _directory(kernel)
    directory.mkdir(parents=True, exist_ok=True)
    compile_kernel(kernel, directory)
    if cubin.extract((directory / OBJECT).read_bytes()) != device_code(kernel):
        raise RuntimeError(f"{kernel.name}, compiled once more, is not what was built")
    # The compiler leaves it there.
    (written,) = Path.cwd().glob("*.ptx")
    written.rename(_ptx(kernel))


if __name__ == "__main__":
    by_name = {kernel.name: kernel for kernel in matrix()}
    for name in sys.argv[1:]:
        _write(by_name[name])
