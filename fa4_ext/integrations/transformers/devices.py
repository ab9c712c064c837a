"""This module says which head dims run on a device, by a kernel or by PyTorch's flash attention."""

from __future__ import annotations

import functools

import torch

from fa4_ext.flash_attn._native import disabled_kernels
from fa4_ext.flash_attn._planner import capability_and_sms, has_kernel

# PyTorch's flash attention needs this compute capability, and equal head dims.
_LEAST_CAPABILITY = 80
_ROWS = 128


def runs_head_dims(
    device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int
) -> bool:
    """Returns whether the functions of `fa4_ext.flash_attn` take these head dims on a CUDA
    device.
    """
    capability, sm_count = capability_and_sms(device)
    if capability >= _LEAST_CAPABILITY and head_dim == head_dim_v:
        return True
    return _has_kernel(disabled_kernels(), capability, sm_count, dtype, head_dim, head_dim_v)


# torch.compile takes the answer for a constant, as in flash_attn/_cache.py.
runs_head_dims._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _has_kernel(disabled, capability, sm_count, dtype, head_dim, head_dim_v) -> bool:
    return has_kernel(_ROWS, (1, 1), (head_dim, head_dim_v), dtype, capability, sm_count)
