"""What this build contains."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from fa4_ext import _library

#: For CMAKE_PREFIX_PATH of a C++ project that says find_package(fa4_ext).
cmake_prefix_path = str(Path(__file__).with_name("cmake"))


@dataclass(frozen=True)
class KernelInfo:
    """One compiled kernel."""

    name: str
    arch: int  # 90, or 100 for compute capability 10.0 and 10.3
    # "forward", "decode", "backward"; "preprocess" and "postprocess", which go with a backward;
    # "clear", which goes with PyTorch's
    op: str
    dtype: str  # "bf16" or "fp16"
    # the largest that it serves, of query and key; of a postprocess kernel, of its gradient
    head_dim: int
    head_dim_v: int  # the largest of value that it serves
    registers: int  # a thread
    spill_bytes: int  # a thread
    shared_memory_bytes: int  # a thread block
    object_bytes: int


def kernels() -> tuple[KernelInfo, ...]:
    """Every kernel that this build contains, from the manifest compiled into the library."""
    names = [field.name for field in fields(KernelInfo)]
    return tuple(
        KernelInfo(**{name: kernel[name] for name in names}) for kernel in _library.manifest()
    )


def build_info() -> dict:
    """The kernel subset, architectures and versions that the library was built from."""
    return _library.build_info()


def version() -> str:
    """The package's version: of the checkout that it is imported from, or else of the installed
    distribution."""
    checkout = Path(__file__).parents[1] / "version.txt"
    if checkout.exists():
        return checkout.read_text().strip()
    from importlib.metadata import version as installed

    return installed("fa4_ext")
