"""The core kernels as `make build` leaves them."""

import json
from functools import cache
from pathlib import Path

from kernels import cubin, matrix

DIRECTORY = Path(__file__).parents[1] / "build" / "core" / "kernels"
SUBSET = "core"


@cache
def manifest() -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((DIRECTORY / "manifest.json").read_text())}


def kernels() -> tuple[matrix.Kernel, ...]:
    return matrix.subset(SUBSET)


def object_file(kernel: matrix.Kernel) -> bytes:
    return (DIRECTORY / "objects" / f"{kernel.name}.o").read_bytes()


def device_code(kernel: matrix.Kernel) -> bytes:
    return cubin.extract(object_file(kernel))
