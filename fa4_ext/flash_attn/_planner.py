"""This module asks the planner whether a kernel takes tensors of a shape."""

from __future__ import annotations

import torch

from ._native import ops


def capability_and_sms(device: torch.device) -> tuple[int, int]:
    """Returns a CUDA device's compute capability as one number, 90 for 9.0, and its SMs."""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def has_kernel(
    rows: int,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    capability: int,
    sm_count: int,
    *,
    keys_in_use: bool = False,
) -> bool:
    """Returns whether a kernel runs attention of `rows` queries to as many keys, without a mask.

    Args:
        rows: the queries of the one sequence.
        heads: of queries, and of keys and values.
        head_dims: of queries and keys, and of values.
        dtype: of all tensors.
        capability: the compute capability, 90 for 9.0.
        sm_count: the device's SMs.
        keys_in_use: whether the keys are a dense cache with seqused_k.
    """
    q, k, v = (
        torch.empty(1, rows, of_heads, dim, dtype=dtype, device="meta")
        for of_heads, dim in ((heads[0], head_dims[0]), *((heads[1], dim) for dim in head_dims))
    )
    used = torch.empty(1, dtype=torch.int32, device="meta") if keys_in_use else None
    answer, *_ = ops.explain(
        q, k, v, None, None, rows, rows, 0.0, False, False, None, -1, -1, used, None, None, None,
        False, False, True, capability, sm_count, own=True,
    )  # fmt: skip
    return answer
