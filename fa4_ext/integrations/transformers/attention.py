"""This module has the attention function that transformers calls in every layer.

It takes what the kernels compute to the functions of `fa4_ext.flash_attn`, and everything else to
transformers' own functions, with the dense mask: to sdpa_attention_forward, or, where that lacks a
feature too, to the model's own eager attention.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fa4_ext.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from fa4_ext.flash_attn._cache import reads_in_place
from fa4_ext.integrations.transformers.bounds import given_sequences, seen_keys
from fa4_ext.integrations.transformers.compact import CompactMask, dense_mask, packs_rows
from fa4_ext.integrations.transformers.devices import runs_head_dims
from fa4_ext.integrations.transformers.heads import attend_by_head, has_heads_outside_rows
from fa4_ext.integrations.transformers.models import adds_masks
from fa4_ext.integrations.transformers.rows import Rows

Results = tuple[torch.Tensor, torch.Tensor | None]

# The dtypes that the kernels compute in, by the type of device.
DTYPES = {"cuda": (torch.bfloat16, torch.float16)}
LARGEST_HEAD_DIM = 256

# The arguments that the kernels cannot honour.
_ASKS_MORE = {"softcap", "sinks", "position_bias", "indices", "block_indices"}


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> Results:
    """Computes attention, by transformers' interface of attention functions.

    A mask says all about what is hidden. Without one, the call is causal if `is_causal`, or else
    the module, says so and there is more than one query, as in transformers' sdpa. Where a model
    has its own eager attention only, a call without a mask hides nothing.

    Args:
        module: the layer.
        query: (batch, heads, q_length, head_dim).
        key: (batch, kv_heads, kv_length, head_dim).
        value: (batch, kv_heads, kv_length, head_dim_v).
        attention_mask: a `CompactMask`; or (batch or 1, heads or 1, q_length, kv_length), bool or
            added to the scores; or None.
        dropout: the probability with which a weight is dropped.
        scaling: the factor of the scores; None means 1 / sqrt(head_dim).
        is_causal: whether a call without a mask is causal; None leaves it to the module.
        s_aux: (heads,), the logits of attention sinks.
        others: the further arguments of the interface. Of them softcap, sinks, position_bias and
            indices change the result. cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k,
            the bounds of packed sequences, count where they end at the number of tokens of the
            call, without a mask or with one that holds no more than a window.

    Returns:
        The output, (batch, q_length, heads, head_dim_v), contiguous, and None for the weights,
        which only a model's eager attention returns.

    Raises:
        NotImplementedError: the layer selects keys in a way that only its own code knows; the call
            needs the model's eager attention, and it has none; or no kernel covers it, and a
            packed sequence continues in the next row.
    """
    causal = _is_causal(module) if is_causal is None else is_causal
    asked = _given(others)
    q, k, v = _in_one_dtype(module, query, key, value)
    sequences = given_sequences(module, query, key, attention_mask, causal, others)
    if not dropout and not _ASKS_MORE & asked and _covered(q, k, v):
        options: dict[str, Any] = dict(softmax_scale=scaling, learnable_sink=s_aux)
        if sequences is not None:
            packed, left, right = sequences
            options |= dict(causal=right == 0, window_size=(left, right))
            return _varlen(q, k, v, packed, **options).contiguous(), None
        if attention_mask is None and (q.shape[2] <= k.shape[2] or not causal):
            return _without_mask(q, k, v, causal, **options).contiguous(), None
        if isinstance(attention_mask, CompactMask) and _fits(attention_mask, q, k, v, s_aux):
            return _with_mask(q, k, v, attention_mask, **options).contiguous(), None
    if sequences is not None:
        mask = seen_keys(sequences, query, key)
    elif isinstance(attention_mask, CompactMask):
        mask = dense_mask(attention_mask)
    else:
        mask = attention_mask
    if mask is not None and mask.is_floating_point() and mask.dtype != query.dtype:
        mask = mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
    if "block_indices" in asked:
        mask = _of_blocks(module, mask, query, key, others)
    if "indices" in asked:
        mask = _selected(_explicit(mask, query, key, causal), others["indices"])
    if s_aux is not None or {"softcap", "sinks"} & asked:
        explicit = _explicit(mask, query, key, causal)
        others = {**others, "s_aux": s_aux}
        return _eager(module, query, key, value, explicit, dropout, scaling, others)
    return _sdpa(module, query, key, value, mask, dropout, scaling, causal, **others)


def _is_causal(module: torch.nn.Module) -> bool:
    """Returns whether a call of the layer is causal without a mask.

    A model that has no attention but its own eager one always gets a causal mask, so that it may
    leave the attribute as it is.
    """
    config = getattr(module, "config", None)
    return bool(getattr(module, "is_causal", True)) and not adds_masks(type(config))


def _given(others: dict[str, Any]) -> set[str]:
    """Returns the names of the arguments that were given."""
    return {name for name, value in others.items() if value is not None}


def _in_one_dtype(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the tensors in the dtype to compute in.

    Layers that are kept in float32 under autocast or in a quantised model hand on float32.
    """
    if torch.float32 not in (query.dtype, key.dtype, value.dtype):
        return query, key, value
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    elif hasattr(getattr(module, "config", None), "_is_quantized"):
        dtype = module.config.dtype
    else:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _covered(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Returns whether there are kernels for tensors like these."""
    dims = query.shape[-1], value.shape[-1]
    return (
        query.dtype in DTYPES.get(query.device.type, ())
        and query.dtype == key.dtype == value.dtype
        and key.shape[-1] == query.shape[-1]
        and all(dim % 8 == 0 and dim <= LARGEST_HEAD_DIM for dim in dims)
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and all(size > 0 for size in query.shape)
        and key.shape[2] > 0
        and _device_runs(query.device, query.dtype, *dims)
    )


def _device_runs(device: torch.device, dtype: torch.dtype, *dims: int) -> bool:
    # Where a compiled program has symbols for them, they become constants of it.
    return device.type != "cuda" or runs_head_dims(device, dtype, *map(operator.index, dims))


def _fits(
    mask: CompactMask,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: torch.Tensor | None,
) -> bool:
    """Returns whether the mask's description is that of this call, and a kernel has its gradient,
    if one is needed.
    """
    if mask.changed is not None or mask.shape != (query.shape[0], 1, query.shape[2], key.shape[2]):
        return False
    in_cache = mask.lengths is not None and not packs_rows(mask)
    inputs = (query, key, value) if sink is None else (query, key, value, sink)
    needs_gradient = torch.is_grad_enabled() and any(one.requires_grad for one in inputs)
    return not (in_cache and needs_gradient)


def _without_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, **options: Any
) -> torch.Tensor:
    q_length = query.shape[2]
    causal = causal and q_length > 1
    if causal:
        # A static cache that was empty before: the other keys are not in use yet.
        key, value = key[:, :, :q_length], value[:, :, :q_length]
    return _dense_call(query, key, value, causal=causal, **options)


def _with_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: CompactMask, **options: Any
) -> torch.Tensor:
    options |= dict(causal=mask.right == 0, window_size=(mask.left, mask.right))
    no_sink = options["learnable_sink"] is None
    if no_sink and has_heads_outside_rows(key, value) and _gains_by_head(query, key, value, mask):
        return attend_by_head(query, key, value, mask, **options)
    if mask.cu_seqlens_q is not None and mask.cu_seqlens_k is not None:
        longest = mask.max_seqlen_q, mask.max_seqlen_k
        if torch.compiler.is_compiling():
            # No sequence is longer than a row, and a graph is to serve other masks, too.
            longest = query.shape[2], key.shape[2]
        packed = Rows(mask.cu_seqlens_q, mask.cu_seqlens_k, *longest)
        return _varlen(query, key, value, packed, **options)
    if mask.lengths is not None:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out: Any = flash_attn_with_kvcache(q, k, v, cache_seqlens=mask.lengths, **options)
        return out
    if mask.used is not None:
        key, value = key[:, :, : mask.used], value[:, :, : mask.used]
    return _dense_call(query, key, value, **options)


def _gains_by_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: CompactMask
) -> bool:
    """Returns whether packed sequences of single heads spare a copy of the cache."""
    if mask.runs is not None:
        return True
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return mask.lengths is not None and not packs_rows(mask) and not reads_in_place(q, k, v)


def _dense_call(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in tensors)
    out: Any = flash_attn_func(q, k, v, **options)
    return out


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Rows, **options: Any
) -> torch.Tensor:
    """Computes attention of packed sequences, whose bounds count in the flattened batch."""
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    out: Any = flash_attn_varlen_func(q, k, v, *packed, **options)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _sdpa(*arguments: Any, **others: Any) -> Results:
    return sdpa_attention_forward(*arguments, **others)


def _eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    others: dict[str, Any],
) -> Results:
    """Computes attention with the function of the model, which knows its sinks and soft cap."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__} needs sinks or a soft cap in a call that the kernels do not "
            "cover, and its module has no eager_attention_forward"
        )
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return eager(module, query, key, value, mask, scaling=scale, dropout=dropout, **others)


def _explicit(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, causal: bool
) -> torch.Tensor | None:
    """Returns a mask that says what `causal` says in a call without a mask."""
    if mask is not None or not causal or query.shape[2] == 1:
        return mask
    shape = 1, 1, query.shape[2], key.shape[2]
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()


def _of_blocks(
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    others: dict[str, Any],
) -> torch.Tensor:
    """Returns a mask that leaves to each query the blocks of keys that the layer selected."""
    build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if build is None:
        raise NotImplementedError(
            f"{type(module).__name__} selects blocks of keys in a way that fa4_ext does not "
            'support: load the model with attn_implementation="sdpa"'
        )
    positions = others.get("position_ids")
    if positions is None:
        positions = torch.arange(key.shape[2], device=query.device)[-query.shape[2] :]
    positions = positions.expand(query.shape[0], -1)
    blocks = others["block_indices"]
    return build(blocks, mask, key.shape[2], query.dtype, query.device, positions)


def _selected(mask: torch.Tensor | None, indices: torch.Tensor) -> torch.Tensor:
    """Returns a mask that leaves to each query the keys of `indices`, (batch, q_length, keys)."""
    if mask is None:
        raise NotImplementedError(
            "fa4_ext selects keys by their indices together with a mask only: load the model with "
            'attn_implementation="sdpa"'
        )
    shape = indices.shape[0], *mask.shape[1:]
    seen = torch.zeros(shape, dtype=torch.bool, device=mask.device)
    seen = seen.scatter(-1, indices.long()[:, None], True)
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
