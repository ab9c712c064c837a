"""This module says which head dims run on a device, by a kernel or by PyTorch's flash attention."""

from __future__ import annotations

import functools

import torch

from fa4_ext.flash_attn._native import disabled_kernels, ops

# PyTorch's flash attention needs this compute capability, and equal head dims.
_LEAST_CAPABILITY = 80
_ROWS = 128


def runs_head_dims(
    device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int
) -> bool:
    """Returns whether the functions of `fa4_ext.flash_attn` take these head dims on a CUDA
    device.
    """
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    if capability >= _LEAST_CAPABILITY and head_dim == head_dim_v:
        return True
    sm_count = properties.multi_processor_count
    return _has_kernel(disabled_kernels(), capability, sm_count, dtype, head_dim, head_dim_v)


# torch.compile takes the answer for a constant, as in flash_attn/_cache.py.
runs_head_dims._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _has_kernel(disabled, capability, sm_count, dtype, head_dim, head_dim_v) -> bool:
    q, k, v = (
        torch.empty(1, _ROWS, 1, dim, dtype=dtype, device="meta")
        for dim in (head_dim, head_dim, head_dim_v)
    )
    answer, *_ = ops.explain(
        q, k, v, None, None, _ROWS, _ROWS, 0.0, False, False, None, -1, -1, None, None, None, None,
        False, False, True, capability, sm_count, own=True,
    )  # fmt: skip
    return answer
