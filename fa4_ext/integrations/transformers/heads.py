"""This module attends to a cache without copying it: to one with padding, or where no kernel reads
a dense cache in place.

A cache has its heads outside its rows, so that the rows of a batch are no packed sequences in it.
But the rows of each head are: here every head of keys is a batch entry of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from fa4_ext.flash_attn import flash_attn_varlen_func
from fa4_ext.integrations.transformers.compact import CompactMask
from fa4_ext.integrations.transformers.rows import Rows


def has_heads_outside_rows(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Returns whether tensors (batch, heads, rows, dim) have heads outside rows, without gaps."""
    return key.shape[1] > 1 and key.is_contiguous() and value.is_contiguous()


def attend_by_head(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: CompactMask,
    **options: Any,
) -> torch.Tensor:
    """Computes attention where a row's queries see a run of its keys.

    Args:
        query: (batch, heads, q_length, head_dim).
        key: (batch, kv_heads, kv_length, head_dim), contiguous.
        value: (batch, kv_heads, kv_length, head_dim_v), contiguous.
        mask: has `runs`, or `lengths` without padding.
        options: further arguments of `flash_attn_varlen_func`.

    Returns:
        The output, (batch, q_length, heads, head_dim_v).
    """
    batch, _, q_length, _ = query.shape
    kv_heads, kv_length = key.shape[1:3]
    grouped = query.unflatten(1, (kv_heads, -1)).transpose(2, 3)  # heads of a group side by side
    out: Any = flash_attn_varlen_func(
        grouped.flatten(0, 2),
        key.flatten(0, 2).unsqueeze(1),
        value.flatten(0, 2).unsqueeze(1),
        *_rows(mask, kv_heads, q_length, kv_length),
        **options,
    )
    by_head = out.unflatten(0, (batch, kv_heads, q_length))
    return by_head.transpose(1, 2).flatten(2, 3)


def _rows(mask: CompactMask, kv_heads: int, q_length: int, kv_length: int) -> Rows:
    """Returns the sequences: of each row and head the keys before the run, the run, and the keys
    behind it. Outside of a graph they are computed once a forward."""
    if torch.compiler.is_compiling():
        return _computed(_runs(mask), kv_heads, q_length, kv_length)
    if kv_heads not in mask._by_heads:
        mask._by_heads[kv_heads] = _computed(_runs(mask), kv_heads, q_length, kv_length)
    return mask._by_heads[kv_heads]


def _runs(mask: CompactMask) -> torch.Tensor:
    """Returns the first key and the one behind the last that the queries of each row see."""
    if mask.runs is not None:
        return mask.runs
    assert mask.lengths is not None
    return torch.stack([torch.zeros_like(mask.lengths), mask.lengths], 1)


def _computed(runs: torch.Tensor, kv_heads: int, q_length: int, kv_length: int) -> Rows:
    first, end = runs.repeat_interleave(kv_heads, 0).unbind(1)
    of_keys = torch.stack([first, end - first, kv_length - end], 1)
    of_queries = torch.zeros_like(of_keys)
    of_queries[:, 1] = q_length
    return Rows(_starts(of_queries), _starts(of_keys), q_length, kv_length)


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.flatten().cumsum(0, dtype=torch.int32), (1, 0))
