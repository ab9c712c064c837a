"""This module has the mask function that transformers calls once a forward.

It answers with a `CompactMask` where it recognises the mask, and otherwise with the dense mask of
transformers' sdpa_mask. It reads from the device at most once. While a graph is traced nothing may
be read: then it answers None where the mask hides nothing but the future, and a dense mask
otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from fa4_ext.integrations.transformers import rows
from fa4_ext.integrations.transformers.compact import CompactMask
from fa4_ext.integrations.transformers.models import (
    adds_masks,
    refuse_own_attention,
    supports_sdpa,
)
from fa4_ext.integrations.transformers.patterns import FULL, MaskFunction, Pattern, recognised

Offset: TypeAlias = int | torch.Tensor


class _Place(NamedTuple):
    """Where queries and keys lie: the first of each has the position of its offset.

    Attributes:
        used: how many keys lie up to the last query.
        dtype: of the mask that the model expects: bool, or that of a mask that it adds.
    """

    batch: int
    q_length: int
    kv_length: int
    q_offset: Offset
    kv_offset: int
    used: Offset
    device: torch.device
    dtype: torch.dtype

    @property
    def from_the_start(self) -> bool:
        """Returns whether queries and keys are the same tokens."""
        return self.q_length == self.kv_length and _is(self.used, self.kv_length)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Offset = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    **others: Any,
) -> torch.Tensor | None:
    """Returns the mask that the attention function gets, by transformers' interface of masks.

    Args:
        batch_size: the number of rows.
        q_length: the number of queries of a row.
        kv_length: the number of keys of a row, those of a static cache that are not in use yet
            included.
        q_offset: the position of the first query, a number or a tensor, ().
        kv_offset: the position of the first key.
        mask_function: says of a query and a key whether the query sees the key.
        attention_mask: (batch_size, length), bool: which tokens are no padding.
        allow_is_causal_skip: whether None may stand for a causal mask.
        allow_is_bidirectional_skip: whether None may stand for a mask that hides nothing.
        device: where the mask lies.
        config: the configuration of the model.
        dtype: of the mask, where the model adds it to its scores.
        others: further arguments of transformers' sdpa_mask.

    Returns:
        A `CompactMask` or a dense mask, (batch_size, 1, q_length, kv_length), bool or added to the
        scores; or None where that is allowed and the mask hides nothing, or the future only.

    Raises:
        ValueError: the model does not call attention through transformers' interface.
    """
    if config is not None:
        refuse_own_attention(type(config))
    adds = adds_masks(type(config))
    place = _Place(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        q_offset + q_length - kv_offset,
        torch.device(device),
        dtype if adds else torch.bool,
    )
    mask = None
    traced = is_tracing(attention_mask)
    found = None if traced else recognised(mask_function)
    if traced or _is_fake(place, found):
        found = _traced(place, mask_function, attention_mask)
        hides_nothing, hides_the_future = found is FULL, found not in (None, FULL)
    else:
        mask = None if found is None else _described(place, found, attention_mask)
        hides_nothing = mask is not None and _hides_nothing(mask)
        hides_the_future = mask is not None and _hides_the_future_only(place, mask)
    takes_full = adds or supports_sdpa(type(config))
    if allow_is_bidirectional_skip and hides_nothing and takes_full:
        return None
    if allow_is_causal_skip and hides_the_future and _takes_none(config):
        return None
    if mask is not None:
        return mask
    make_dense = masking_utils.eager_mask if adds else masking_utils.sdpa_mask
    return make_dense(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=device,
        dtype=dtype,
        **others,
    )


def _takes_none(config: Any) -> bool:
    """Returns whether the model's code allows for a causal mask that is missing.

    Layers that share keys and values may get the last queries only, with the last rows of the
    mask. Without one nothing tells where these queries lie.
    """
    return supports_sdpa(type(config)) and not getattr(config, "num_kv_shared_layers", 0)


def _is(number: Offset, other: int) -> bool:
    return isinstance(number, int) and number == other


def _is_fake(place: _Place, pattern: Pattern | None) -> bool:
    """Returns whether tensors that say where sequences or queries lie have no values to read."""
    tensors = place.q_offset, *(() if pattern is None else pattern)
    return any(isinstance(one, torch.Tensor) and is_tracing(one) for one in tensors)


def _traced(
    place: _Place, mask_function: MaskFunction, padding: torch.Tensor | None
) -> Pattern | None:
    """Returns the pattern of a mask that needs no description."""
    if padding is not None:
        return None
    if mask_function is masking_utils.bidirectional_mask_function:
        return FULL
    plain = mask_function is masking_utils.causal_mask_function and place.from_the_start
    return Pattern(right=0) if plain else None


def _hides_the_future_only(place: _Place, mask: CompactMask) -> bool:
    """Returns whether transformers' sdpa gets no mask where this one is allowed to be missing."""
    only_causal = mask.right == 0 and mask.left < 0 and mask.visible_keys is None
    from_zero = place.from_the_start or _is(place.q_offset, 0)
    return only_causal and mask.sequences is None and from_zero


def _hides_nothing(mask: CompactMask) -> bool:
    return mask.left < 0 and mask.right < 0 and mask.visible_keys is None and mask.sequences is None


def _described(place: _Place, pattern: Pattern, padding: torch.Tensor | None) -> CompactMask | None:
    """Returns the description of a mask, or None if it has none."""
    if pattern.sequences is not None or pattern.positions is not None:
        return _packed(place, pattern) if padding is None else None
    visible_keys = None
    if padding is not None:
        visible_keys = _visible_keys(place, padding)
        if visible_keys is None:
            return None
    if pattern.chunk is not None:
        return _chunked(place, pattern, visible_keys)
    return _windowed(place, pattern, visible_keys)


def _visible_keys(place: _Place, padding: torch.Tensor) -> torch.Tensor | None:
    """Returns the padding mask of the keys, or None if it does not fit them.

    A mask with other rows than the batch fits where they are all alike: a single row may stand for
    all, and MusicGen has a row for each codebook.
    """
    end = place.kv_offset + place.kv_length
    prepared = masking_utils.prepare_padding_mask(padding, place.kv_length, place.kv_offset)
    if padding.dim() != 2 or prepared is None:
        return None
    visible = prepared[:, place.kv_offset : end].bool()
    if padding.shape[0] == place.batch:
        return visible
    first = visible[:1]
    return first.expand(place.batch, -1) if (visible == first).all() else None


def _packed(place: _Place, pattern: Pattern) -> CompactMask | None:
    if pattern.sequences is None or pattern.positions is None or pattern.chunk is not None:
        return None
    if not place.from_the_start or pattern.sequences.shape != (place.batch, place.kv_length):
        return None
    lengths = rows.read_packed(pattern.sequences, pattern.positions)
    if lengths is None:
        return None
    return _of_sequences(place, pattern, pattern.sequences, lengths)


def _of_sequences(
    place: _Place, pattern: Pattern, sequences: torch.Tensor, lengths: list[list[int]]
) -> CompactMask:
    """Returns a mask of self attention in which each sequence sees itself."""
    if all(len(row) == 1 for row in lengths):
        return _mask(place, pattern)
    every = rows.of_sequences((length for row in lengths for length in row), place.device)
    return _mask(place, pattern, every, sequences=sequences)


def _chunked(
    place: _Place, pattern: Pattern, visible_keys: torch.Tensor | None
) -> CompactMask | None:
    chunk, starts = pattern.chunk, pattern.chunk_starts
    if chunk is None or starts is None or pattern.right != 0:
        return None
    if visible_keys is not None:
        # Chunks start behind the padding, so that the padding mask hides what the chunks hide.
        if place.kv_length + place.kv_offset > chunk or place.kv_offset or starts.dim() != 1:
            return None
        return _windowed(place, pattern, visible_keys, starts)
    if starts.any():
        return None
    if place.kv_length + place.kv_offset <= chunk:
        return _windowed(place, pattern, None)
    if place.from_the_start and not place.kv_offset:
        lengths = [rows.chunks(place.kv_length, chunk)] * place.batch
        sequences = torch.arange(place.kv_length, device=place.device) // chunk
        return _of_sequences(place, pattern, sequences.expand(place.batch, -1), lengths)
    if place.q_length == 1 and isinstance(place.q_offset, int):
        since_start = place.q_offset % chunk
        left = since_start if pattern.left is None else min(pattern.left, since_start)
        return _windowed(place, pattern._replace(left=left), None)
    return None


def _windowed(
    place: _Place,
    pattern: Pattern,
    visible_keys: torch.Tensor | None,
    runs_start_at: torch.Tensor | None = None,
) -> CompactMask | None:
    """Returns the description of a mask of padding and a window, or None if it has none.

    `runs_start_at`, (batch,), is where the keys that are no padding have to start.
    """
    causal, aligned = pattern.right == 0, pattern.is_relative
    if isinstance(place.used, int) and aligned:
        if not 0 < place.used <= place.kv_length or (place.used < place.kv_length and not causal):
            return None
    elif aligned and not causal:
        return None
    if visible_keys is None:
        return _mask(place, pattern)
    used = place.used if aligned else place.kv_length
    offsets = [used] if isinstance(used, torch.Tensor) else []
    starts = [] if runs_start_at is None else [runs_start_at]
    padding = rows.read_padding(visible_keys, *offsets, *starts)
    if not padding.contiguous:
        return None
    in_use = padding.others[0][0] if offsets else used
    if starts and any(
        b and a != c for (a, b), c in zip(padding.runs, padding.others[-1], strict=True)
    ):
        return None
    if all(run == (0, in_use) for run in padding.runs):
        return _mask(place, pattern)
    return _padded(place, pattern, visible_keys, padding, int(in_use))


def _padded(
    place: _Place,
    pattern: Pattern,
    visible_keys: torch.Tensor,
    padding: rows.Padding,
    in_use: int,
) -> CompactMask | None:
    """Returns the description of a mask that hides padding, or None if it has none."""
    q_length, kv_length, device = place.q_length, place.kv_length, place.device
    if not pattern.is_relative:
        every = rows.of_all_queries(padding, q_length, kv_length, device, in_static_cache=False)
    elif place.from_the_start:
        if pattern.right == 0 and not any(a for a, _ in padding.runs):
            # What lies behind a token is hidden from it anyway.
            return _mask(place, pattern, visible_keys=visible_keys)
        every = rows.of_self_attention(padding, kv_length, device)
    elif all(b in (0, in_use) for _, b in padding.runs):
        static = not _is(place.used, kv_length)
        every = rows.of_all_queries(padding, q_length, kv_length, device, in_static_cache=static)
        runs = torch.tensor(padding.runs, dtype=torch.int32).to(device, non_blocking=True)
        return _mask(place, pattern, every, visible_keys=visible_keys, runs=runs)
    else:
        return None
    return _mask(place, pattern, every, visible_keys=visible_keys)


def _mask(
    place: _Place,
    pattern: Pattern,
    every: rows.Rows | None = None,
    **tensors: torch.Tensor,
) -> CompactMask:
    """Returns the mask of a pattern, in which chunks are dealt with."""
    left, right = (-1 if bound is None else bound for bound in (pattern.left, pattern.right))
    used, lengths = None, None
    if pattern.is_relative and not _is(place.used, place.kv_length):
        if isinstance(place.used, int) and place.q_length > 1:
            used = place.used
        else:
            lengths = _lengths(place)
    if every is not None:
        tensors |= dict(cu_seqlens_q=every.cu_seqlens_q, cu_seqlens_k=every.cu_seqlens_k)
    return CompactMask(
        (place.batch, 1, place.q_length, place.kv_length),
        anchor=torch.empty(0, dtype=torch.bool, device=place.device),
        left=left if left < place.kv_length else -1,
        right=right,
        used=used,
        lengths=lengths,
        max_seqlen_q=every.max_seqlen_q if every else 0,
        max_seqlen_k=every.max_seqlen_k if every else 0,
        dtype=place.dtype,
        **tensors,
    )


def _lengths(place: _Place) -> torch.Tensor:
    if isinstance(place.used, torch.Tensor):
        return place.used.to(torch.int32).repeat(place.batch)
    return torch.full((place.batch,), place.used, dtype=torch.int32, device=place.device)
