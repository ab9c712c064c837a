"""This module loads the library that defines the ops, and says where torch has them. In a package
for Hugging Face's Hub another module has its place (scripts/hub/_native.py): it alone knows the
library and the namespace."""

from __future__ import annotations

import torch

from fa4_ext import _library

NAMESPACE = "fa4_ext"


def disabled_kernels() -> tuple[str, ...]:
    """Returns the patterns of the kernels that are left out."""
    return _library.disabled_kernels()


_library.native()  # defines the ops, or raises
ops = getattr(torch.ops, NAMESPACE)
