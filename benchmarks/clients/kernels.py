"""Whose kernels compute attention in a profile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Marks in the names of kernels. CuTe DSL's names hold the module path, which says flash too, as
# cuDNN's names do; plain math has a softmax of its own.
MARKS = (
    ("fa4_ext", "kernel_cutlass"),
    ("cuDNN", "cudnn"),
    ("FA2", "flash_"),
    ("efficient", "fmha_"),
    ("math", "softmax"),
)


def owner(kernel: str) -> str | None:
    """Returns whose attention kernel has this name; None where it computes something else."""
    return next((name for name, mark in MARKS if mark in kernel), None)


def measured(work: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Returns the milliseconds that the GPU spends in all kernels of `work()`, and in those of
    attention, by their owner."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    total, attention = 0.0, dict[str, float]()
    for event in profiler.events():
        if event.device_type != DeviceType.CUDA:
            continue
        time = event.time_range.elapsed_us() / 1e3
        total += time
        if name := owner(event.name):
            attention[name] = attention.get(name, 0.0) + time
    return total, attention
