"""FlashAttention-4 for PyTorch, compiled ahead of time.

Importing this package puts its kernels behind PyTorch's attention ops, so that
F.scaled_dot_product_attention and torch.nn.attention.varlen run them on Hopper and Blackwell GPUs.
If the environment variable FA4_EXT_AUTOREGISTER is 0, false, no or off, the import overrides
nothing. The import warns where the library cannot be used; it raises ImportError only in a checkout
that was never built.

Attributes:
    default_handle: the `Handle` of the import's own registration, or None without one.
    cmake_prefix_path: a folder for CMAKE_PREFIX_PATH of a C++ project (str).
    __version__: the version of this package (str).
"""

from __future__ import annotations

from fa4_ext import _register
from fa4_ext._explain import Explanation, explain
from fa4_ext._info import KernelInfo, build_info, cmake_prefix_path, kernels
from fa4_ext._register import Handle, register

__all__ = [
    "Explanation",
    "Handle",
    "KernelInfo",
    "build_info",
    "cmake_prefix_path",
    "default_handle",
    "explain",
    "kernels",
    "register",
]

_register.register_at_import()
default_handle = _register.default_handle


def __getattr__(name: str) -> str:
    if name == "__version__":
        from fa4_ext._info import version

        return version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
