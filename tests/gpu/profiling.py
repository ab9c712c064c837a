"""Which kernels a piece of work runs, and whose they are."""

from __future__ import annotations

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def kernels_of(work) -> list[str]:
    """Returns the names of the CUDA kernels that `work()` runs, in order. A run before has done
    lazy initialisation."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def provider(kernel: str) -> str:
    """Returns whose kernel has this name. CuTe DSL's names hold "kernel_cutlass" and the module
    path, which says flash too, as cuDNN's names do."""
    for owner, mark in (
        ("ours", "kernel_cutlass"),
        ("cudnn", "cudnn"),
        ("stock", "flash_"),
        ("efficient", "fmha_"),
    ):
        if mark in kernel:
            return owner
    return "other"


def providers_of(work) -> set[str]:
    """Returns the providers of the kernels, whoever clears memory for them."""
    return {provider(name) for name in kernels_of(work) if "emset" not in name}
