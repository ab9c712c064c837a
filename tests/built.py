"""Reads the kernels as `make build` leaves them: the core subset, unless it was asked for
another."""

import json
from functools import cache
from pathlib import Path

import fa4_ext
from kernels import cubin, matrix
from kernels.kernel import Kernel

SUBSET, ARCHS = (fa4_ext.build_info()[name] for name in ("subset", "archs"))
DIRECTORY = Path(__file__).parents[1] / "build" / SUBSET / "kernels"


@cache
def manifest() -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((DIRECTORY / "manifest.json").read_text())}


def kernels() -> tuple[Kernel, ...]:
    return tuple(kernel for kernel in matrix.subset(SUBSET) if kernel.arch in ARCHS)


def object_file(kernel: Kernel) -> bytes:
    return (DIRECTORY / "objects" / f"{kernel.name}.o").read_bytes()


def device_code(kernel: Kernel) -> bytes:
    return cubin.extract(object_file(kernel))
