"""This module has the place of fa4_ext/flash_attn/_native.py in a package for Hugging Face's Hub.
It loads the library beside it, which is named after the namespace of its ops."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

(_LIBRARY,) = Path(__file__).parent.glob("lib*.so")

NAMESPACE = _LIBRARY.stem.removeprefix("lib")
ops = getattr(torch.ops, NAMESPACE)


def disabled_kernels() -> tuple[str, ...]:
    """Returns the patterns of the kernels that are left out: nothing tells the package of any."""
    return ()


def _load() -> None:
    """Defines the ops.

    Raises:
        RuntimeError: torch refused them.
    """
    library = ctypes.CDLL(str(_LIBRARY))
    library.fa4_ext_problem.restype = ctypes.c_char_p
    if problem := library.fa4_ext_problem():
        raise RuntimeError(problem.decode(errors="replace"))


# Another copy of this package has the same ops: the namespace has a hash of the build in its name.
if not hasattr(ops, "attention"):
    _load()
