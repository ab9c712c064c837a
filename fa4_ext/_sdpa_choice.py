"""This module says to which op PyTorch takes a plain call of F.scaled_dot_product_attention.

The conditions are those of can_use_cudnn_attention and can_use_flash_attention in PyTorch's
sdp_utils.cpp, for PyTorch's own order of backends, which has cuDNN first on Hopper and Blackwell.
"""

from __future__ import annotations

import contextlib
import os

import torch

from fa4_ext import _environment

# Whose op gets a call.
CUDNN, FLASH, EFFICIENT, OTHER = "cudnn", "flash", "efficient", "other"

_HALF = (torch.float16, torch.bfloat16)
_CUDNN_FIRST = (90, 100, 103)
_LAST_CUDNN_AFTER_FLASH = 91500
# torch 2.15's cuDNN, for builds of torch that have none.
_NEWEST_CUDNN = 92600
# From this version on cuDNN gets head dims above 128 on Hopper; below, only 192 with 128 for value.
_CUDNN_WITH_LARGE_HEAD_DIMS = 92201 if _environment.torch_version() >= (2, 15) else 91000


def op_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool,
    enable_gqa: bool,
    deterministic: bool,
    capability: int,
    attn_mask: torch.Tensor | None = None,
) -> str:
    """Returns whose op gets the call: CUDNN, FLASH, EFFICIENT, or OTHER for math, an error, or
    memory-efficient attention in float32. `capability` is 90 for compute capability 9.0."""
    tensors = (query, key, value)
    if not _fused(*tensors, enable_gqa, capability):
        return OTHER
    first = capability in _CUDNN_FIRST and _prefers_cudnn()
    unmasked = attn_mask is None
    fits = unmasked or not _why_mask_does_not_fit(attn_mask, query, key)
    if first and not deterministic and fits and _cudnn_takes(*tensors, capability):
        return CUDNN
    if unmasked and _flash_takes(*tensors, is_causal):
        return FLASH
    return EFFICIENT if _efficient_takes(*tensors, attn_mask) else OTHER


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    enable_gqa: bool,
    capability: int,
) -> bool:
    """Returns whether a call meets the conditions that both ops have in common."""
    tensors = (query, key, value)
    if any(tensor.dim() != 4 for tensor in tensors) or not 80 <= capability <= 121:
        return False
    heads, heads_kv = query.size(1), key.size(1)
    grouped = enable_gqa and heads_kv > 0 and heads % heads_kv == 0
    return (
        query.dtype in _HALF
        and all(tensor.dtype == query.dtype for tensor in tensors)
        and all(tensor.size(0) == query.size(0) for tensor in tensors)
        and key.shape[1:3] == value.shape[1:3]
        and (heads == heads_kv or grouped)
        and query.size(2) > 0
        and key.size(2) > 0
        and query.size(3) == key.size(3)
        and all(tensor.size(3) == 1 or tensor.stride(3) == 1 for tensor in tensors)
    )


def _cudnn_takes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, capability: int
) -> bool:
    head_dims = query.size(3), value.size(3)
    large = capability == 90 and _cudnn_version() >= _CUDNN_WITH_LARGE_HEAD_DIMS
    return (
        key.size(2) > 1
        and (max(head_dims) <= (256 if large else 128) or head_dims == (192, 128))
        and not any(dim % 8 for dim in head_dims)
    )


def _why_mask_does_not_fit(
    mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> str | None:
    """Returns why cuDNN's op does not get a call with this mask; None where it may."""
    full = (*query.shape[:3], key.size(2))
    if mask.requires_grad:
        return "requires a gradient"
    if mask.dim() not in (2, 4):
        return f"has {mask.dim()} dimensions, neither 2 nor 4"
    if not _broadcasts(mask, full):
        return f"has the shape {tuple(mask.shape)}, which does not broadcast to {full}"
    if mask.stride(-1) != 1:
        return f"has a stride of {mask.stride(-1)}, not 1, in its last dimension"
    return None


def _prefers_cudnn() -> bool:
    deprioritized = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1"
    return not deprioritized and _cudnn_version() > _LAST_CUDNN_AFTER_FLASH


def _cudnn_version() -> int:
    # A cuDNN that is older than the one that torch was built with is an error.
    with contextlib.suppress(RuntimeError):
        return torch.backends.cudnn.version() or _NEWEST_CUDNN
    return _NEWEST_CUDNN


def _flash_takes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool
) -> bool:
    return query.size(3) == value.size(3) <= 256 and not (
        is_causal and query.size(2) != key.size(2)
    )


def _efficient_takes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    return (
        query.size(1) == key.size(1)
        and (mask is None or _broadcasts(mask, (*query.shape[:3], key.size(2))))
        and not any(tensor.size(3) % 8 for tensor in (query, key, value))
        and all(tensor.stride(-1) == 1 for tensor in tensors)
    )


def _broadcasts(mask: torch.Tensor, full: tuple[int, ...]) -> bool:
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    return 2 <= mask.dim() <= len(full) and all(size in (1, whole) for size, whole in sizes)


def why_other(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    enable_gqa: bool,
    *,
    attn_mask: torch.Tensor | None = None,
    deterministic: bool = False,
    capability: int = 90,
) -> str | None:
    """Returns why F.scaled_dot_product_attention takes a call to none of the ops although our
    kernels could run it; None where it is not F.scaled_dot_product_attention that prevents it."""
    if any(tensor.dim() != 4 for tensor in (query, key, value)):
        return None
    if 0 in (query.size(2), key.size(2)):
        return (
            f"query has {query.size(2)} rows and key {key.size(2)}: F.scaled_dot_product_attention "
            "never takes empty ones to cuDNN or flash attention"
        )
    if query.size(1) != key.size(1) and not enable_gqa:
        return (
            f"query has {query.size(1)} heads and key {key.size(1)}: "
            "F.scaled_dot_product_attention needs enable_gqa=True for that"
        )
    if query.size(3) != key.size(3):
        return f"key's head_dim {key.size(3)} differs from query's {query.size(3)}"
    if attn_mask is not None:
        if capability not in _CUDNN_FIRST:
            return None
        return _why_masked_other(attn_mask, query, key, value, deterministic)
    if is_causal and query.size(2) != key.size(2):
        return (
            "F.scaled_dot_product_attention takes is_causal with a query length, "
            f"{query.size(2)}, other than the key length, {key.size(2)}, to cuDNN alone, which "
            "does not run this call; torch.nn.attention.bias.causal_lower_right goes to flash "
            "attention"
        )
    if key.size(3) != value.size(3):
        return (
            f"query's head_dim, {query.size(3)}, differs from value's, {value.size(3)}: "
            "F.scaled_dot_product_attention takes only equal ones to flash attention, and cuDNN "
            "does not run this call; torch.nn.attention.varlen takes others too"
        )
    return None


def _why_masked_other(
    mask: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    deterministic: bool,
) -> str | None:
    if query.dtype not in _HALF or any(t.dtype != query.dtype for t in (key, value)):
        return None
    takes = (
        "F.scaled_dot_product_attention takes a call with attn_mask to cuDNN or memory-efficient "
        "attention"
    )
    if why := _why_mask_does_not_fit(mask, query, key):
        return f"{takes}, and not this one: attn_mask {why}"
    if deterministic:
        return f"{takes}, of which cuDNN has no deterministic backward, the other no grouped heads"
    return f"{takes}, which do not run this call"
