"""This module says what the build contains."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from fa4_ext import _library

#: A folder for CMAKE_PREFIX_PATH of a C++ project that calls find_package(fa4_ext).
cmake_prefix_path = str(Path(__file__).with_name("cmake"))


@dataclass(frozen=True)
class KernelInfo:
    """One compiled kernel.

    Attributes:
        name: its name, unique in a build.
        arch: 90, or 100 for compute capability 10.0 and 10.3.
        op: "forward", "decode", "backward", "backward_groups" (of GQA, and of short packed
            sequences) or "backward_keys"; "backward_queries", the pass before "backward_keys";
            "map_queries" or "map_keys", which are launched with a kernel whose mask is "bias";
            "preprocess" or "postprocess", which are launched with a "backward" or
            "backward_groups";
            "clear", which is launched with PyTorch's own backward.
        dtype: "bf16" or "fp16".
        head_dim: the largest head dim of query and key that it serves; for a postprocess kernel,
            the largest head dim of the gradient that it converts.
        head_dim_v: the largest head dim of value that it serves.
        registers: registers per thread.
        spill_bytes: bytes of local memory per thread.
        shared_memory_bytes: bytes of shared memory per CTA.
        object_bytes: bytes of the compiled object.
    """

    name: str
    arch: int
    op: str
    dtype: str
    head_dim: int
    head_dim_v: int
    registers: int
    spill_bytes: int
    shared_memory_bytes: int
    object_bytes: int


def kernels() -> tuple[KernelInfo, ...]:
    """Returns every kernel of this build, from the manifest that is compiled into the library.

    Raises:
        RuntimeError: the native library could not be loaded.
    """
    names = [field.name for field in fields(KernelInfo)]
    return tuple(
        KernelInfo(**{name: kernel[name] for name in names}) for kernel in _library.manifest()
    )


def build_info() -> dict:
    """Returns what the library was built from: `version`, `commit`, `subset`, `archs`, `versions`
    of the compiling packages, and `manifest_sha256`.

    Raises:
        RuntimeError: the native library could not be loaded.
    """
    return _library.build_info()


def version() -> str:
    """Returns the version of the installed distribution, or in a checkout that of the checkout."""
    checkout = Path(__file__).parents[1] / "version.txt"
    if checkout.exists():
        return checkout.read_text().strip()
    from importlib.metadata import version as installed

    return installed("fa4_ext")
