"""This module reads the bounds of packed sequences that a call gives: cu_seq_lens_q, cu_seq_lens_k,
max_length_q and max_length_k.

Models hand the bounds of a text on to every layer, that of an image's tower included. So they count
only where they end at the number of tokens of the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers.utils.import_utils import is_tracing

from fa4_ext.integrations.transformers.compact import CompactMask, is_pattern
from fa4_ext.integrations.transformers.rows import Rows
from fa4_ext.integrations.transformers.vision import PackedName

_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Sequences(NamedTuple):
    """Packed sequences, of which a query sees the keys of its own, or a window of them.

    Attributes:
        rows: the bounds, which count in the flattened batch.
        left: how many keys before its own position a query sees; -1 means all.
        right: how many keys behind its own position a query sees; -1 means all. 0 is causal.
            A sequence's last query has the position of its last key.
    """

    rows: Rows
    left: int
    right: int


def given_sequences(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    others: dict[str, Any],
) -> Sequences | None:
    """Returns the packed sequences that the call's bounds describe, or None without bounds that
    count: beside a mask that holds more than a window they do not.

    Args:
        module: the layer.
        query: (batch, heads, q_length, head_dim).
        key: (batch, kv_heads, kv_length, head_dim).
        mask: the call's mask.
        causal: whether a call without a mask is causal.
        others: the further arguments of the call.
    """
    if any(others.get(name) is None for name in _NAMES):
        return None
    batch, _, q_length, _ = query.shape
    kv_length = key.shape[2]
    if mask is None:
        left, right = -1, 0 if causal and q_length > 1 else -1
    elif isinstance(mask, CompactMask) and is_pattern(mask):
        if mask.shape != (batch, 1, q_length, kv_length):
            return None
        left, right = mask.left, mask.right
    else:
        return None
    cu_seqlens_q, cu_seqlens_k, *longest = (others[name] for name in _NAMES)
    rows = Rows(cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32), *longest)
    if is_tracing(query) or is_tracing(cu_seqlens_q):
        if right != 0 and not _packs_itself(module):
            rows = _if_they_count(rows, batch, q_length, kv_length)
    elif _last(cu_seqlens_q) != batch * q_length or _last(cu_seqlens_k) not in _numbers_of_keys(
        query, key, mask, right
    ):
        return None
    return Sequences(rows, left, right)


def seen_keys(sequences: Sequences, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Returns which keys a query sees, (batch, 1, q_length, kv_length), bool.

    Raises:
        NotImplementedError: a sequence continues in the next row of the batch.
    """
    batch, device = query.shape[0], query.device
    places, numbers, ends = [], [], []
    for bounds, length in (
        (sequences.rows.cu_seqlens_q, query.shape[2]),
        (sequences.rows.cu_seqlens_k, key.shape[2]),
    ):
        bounds = bounds.to(device, torch.int64)
        if batch > 1 and not is_tracing(query):
            _refuse_sequences_across_rows(bounds, batch, length)
        tokens = torch.arange(batch * length, device=device)
        numbers.append(torch.searchsorted(bounds[1:], tokens, right=True).view(batch, length))
        places.append(tokens.view(batch, length))
        ends.append(bounds[1:])
    q_numbers, k_numbers = numbers
    to_keys = (ends[1] - ends[0])[q_numbers.clamp(max=ends[0].shape[0] - 1)]
    distance = places[1][:, None, :] - (places[0] + to_keys)[:, :, None]
    seen = q_numbers[:, :, None] == k_numbers[:, None, :]
    if sequences.right >= 0:
        seen = seen & (distance <= sequences.right)
    if sequences.left >= 0:
        seen = seen & (distance >= -sequences.left)
    return seen[:, None]


def _packs_itself(module: torch.nn.Module) -> bool:
    """Returns whether the layer makes its bounds itself, after `join_vision_calls`."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return isinstance(name, PackedName)


def _if_they_count(rows: Rows, batch: int, q_length: int, kv_length: int) -> Rows:
    """Returns the sequences where they end at the number of tokens, and otherwise each row of the
    batch as a sequence. In a graph nothing can be read, so that the device chooses.
    """
    lengths = q_length, kv_length
    bounds = rows.cu_seqlens_q, rows.cu_seqlens_k
    ends = [one[-1] == batch * length for one, length in zip(bounds, lengths, strict=True)]
    count = ends[0] & ends[1]

    def chosen(given: torch.Tensor, length: int) -> torch.Tensor:
        padded = torch.nn.functional.pad(given, (batch, 0))
        of_rows = torch.arange(padded.shape[0], device=given.device).clamp(max=batch) * length
        return torch.where(count, padded, of_rows.to(given.dtype))

    cu_seqlens_q, cu_seqlens_k = map(chosen, bounds, lengths)
    return Rows(cu_seqlens_q, cu_seqlens_k, batch * q_length, batch * kv_length)


def _numbers_of_keys(
    query: torch.Tensor, key: torch.Tensor, mask: CompactMask | None, right: int
) -> Iterator[int]:
    """Yields where the bounds of the keys may end: at all keys, or, of a single row, at those of a
    static cache that are in use.
    """
    batch, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    yield batch * kv_length
    if batch > 1:
        return
    if mask is None:
        if right == 0:
            yield q_length
    elif mask.used is not None:
        yield mask.used
    elif mask.lengths is not None:
        yield _last(mask.lengths)


def _last(tensor: torch.Tensor) -> int:
    """Reads a tensor's last element, and keeps it on the tensor: once a forward, and not once a
    layer. What inference mode changes cannot be told, so that it is read again.
    """
    if tensor.is_inference():
        return int(tensor[-1])
    version, last = getattr(tensor, "_fa4_ext_last", (None, 0))
    if version != tensor._version:
        last = int(tensor[-1])
        tensor._fa4_ext_last = tensor._version, last  # type: ignore[attr-defined]
    return last


def _refuse_sequences_across_rows(bounds: torch.Tensor, batch: int, length: int) -> None:
    starts = torch.arange(1, batch, device=bounds.device) * length
    if not torch.isin(starts, bounds).all():
        raise NotImplementedError(
            "fa4_ext supports packed sequences that continue in the next row of a batch only in "
            "calls that the kernels cover: give it a batch of one row"
        )
