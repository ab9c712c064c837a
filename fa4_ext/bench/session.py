"""Sets up a measuring process, in which PyTorch runs without our registration and on one side
stream, and records what its numbers depend on."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import fa4_ext
from fa4_ext.bench.contenders import Contender, cudnn_version
from fa4_ext.bench.correctness import DTYPES
from fa4_ext.bench.timing import in_turns, prepare, stream, summary

NO_DEVICE = "no CUDA device is available: measuring needs one"
QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
CEILING_SIZE = 8192  # of square matrices: from there on cuBLAS gets no faster


@contextmanager
def session() -> Iterator[None]:
    """Removes the import's registration, so that our kernels are registered only while they are
    measured, and runs all work on the side stream."""
    if fa4_ext.default_handle is not None:
        fa4_ext.default_handle.remove()
    with torch.cuda.stream(stream()):
        yield


def matmul_ceiling(rounds: int, dtype: str) -> float:
    """Measures the TFLOP/s of a matrix product, which is what the device gives to a dense kernel in
    this process."""
    a, b = (
        torch.randn(CEILING_SIZE, CEILING_SIZE, dtype=DTYPES[dtype], device="cuda")
        for _ in range(2)
    )
    prepared = prepare(lambda i: a @ b, 1, torch.no_grad, 20.0)
    return (
        2 * CEILING_SIZE**3 / summary(in_turns({"matmul": prepared}, rounds)["matmul"])["ms"] / 1e9
    )


def _device_state() -> dict[str, str]:
    """Returns the driver, clocks and power limit that nvidia-smi reports; empty if nvidia-smi fails
    or does not know the device."""
    device = f"GPU-{torch.cuda.get_device_properties().uuid}"
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "-i", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERY.split(","), done.stdout.strip().split(", "), strict=False))


def header(rounds: int, dtype: str, contenders: list[Contender]) -> dict:
    """Returns what the numbers depend on. The clocks are read after the matrix products, when the
    device is warm."""
    ceiling = matmul_ceiling(rounds, dtype)
    return {
        "device": torch.cuda.get_device_name(),
        **_device_state(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": cudnn_version(),
        "versions": {contender.name: contender.version for contender in contenders},
        "build": fa4_ext.build_info(),
        "dtype": dtype,
        "matmul_tflops": round(ceiling, 1),
        "rounds": rounds,
        "date": time.strftime("%Y-%m-%d"),
    }
