"""Memory that runs out, and how programs tell from an exception that it did and make their batches
smaller."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import contextmanager, suppress

import torch


def accelerate_would_shrink(error: BaseException) -> bool:
    """Asks what accelerate.utils.memory.should_reduce_batch_size asks for where a GPU's memory is
    out: words with their full stop."""
    return (
        isinstance(error, RuntimeError)
        and len(error.args) == 1
        and " out of memory." in error.args[0]
    )


def lightning_would_shrink(error: BaseException) -> bool:
    """Asks what lightning.pytorch.utilities.memory.is_oom_error asks for there."""
    words = "CUDA", "out of memory"
    return (
        isinstance(error, RuntimeError)
        and len(error.args) == 1
        and all(word in error.args[0] for word in words)
    )


WOULD_SHRINK = {"accelerate": accelerate_would_shrink, "lightning": lightning_would_shrink}


def largest_batch(
    attempt: Callable[[int], object], batch: int, would_shrink: Callable[[BaseException], bool]
) -> int:
    """Returns the first of `batch`, its half, and so on that fits, as these programs look for
    it."""
    while batch:
        try:
            attempt(batch)
            return batch
        except Exception as error:
            if not would_shrink(error):
                raise
        torch.cuda.empty_cache()
        batch //= 2
    raise AssertionError("not even one fits")


@contextmanager
def little_memory(spare: int = 2**24):
    """Lets this process have no more of the GPU's memory than `spare` bytes beyond what is in
    use."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # torch's allocator keeps this for later, in blocks that are in use in part.
    held = []
    try:
        _allow_reserved(0)
        for size in (2**26, 2**20, 2**9):
            with suppress(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        _allow_reserved(spare)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _allow_reserved(more: int) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
