"""This module has the mask that the mask function hands to the attention function."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

_TENSORS = (
    "anchor", "lengths", "visible_keys", "sequences", "cu_seqlens_q", "cu_seqlens_k", "runs",
    "changed",
)  # fmt: skip
# The last two do not count for a graph.
_NUMBERS = ("left", "right", "used", "dtype", "max_seqlen_q", "max_seqlen_k")
_KEPT = (torch.ops.aten.detach.default, torch.ops.aten.clone.default)
_ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, torch.ops.aten.add.out)


class CompactMask(torch.Tensor):
    """A mask, (batch, 1, q_length, kv_length), that is described and not stored.

    It stands for a dense mask: a boolean one, true where a query sees a key, or one of another
    dtype, which is added to the scores. An operation on it computes the dense mask and works on
    that, so that code that knows nothing of this class gets the right result. The attention
    function reads the description instead.

    The position of the last query is that of the last key in use; the others lie before it.

    Attributes:
        anchor: (0,), on the mask's device. torch.compile needs a tensor in a tensor like this.
        left: how many keys before its own position a query sees; -1 means all.
        right: how many keys behind its own position a query sees; -1 means all. 0 is causal.
        used: how many keys are in use in every row; None means all, or as many as `lengths` says.
        lengths: (batch,), int32: how many keys of each row are in use, where no number says so.
        visible_keys: (batch, kv_length), bool: which keys are no padding.
        sequences: (batch, kv_length), numbers; a query sees only the keys with its own number.
        cu_seqlens_q: (sequences + 1,), int32: the rows of the batch as packed sequences, each with
            the keys that its queries may see. Keys that nobody sees are sequences without queries,
            queries of padding may be sequences without keys. None where no packing is needed.
        cu_seqlens_k: the same for the keys.
        runs: (batch, 2), int32: the first key and the one behind the last that the queries of a row
            see, where they are the last tokens of a cache.
        max_seqlen_q: the longest sequence's number of queries, or more.
        max_seqlen_k: the longest sequence's number of keys, or more.
        changed: the dense mask, once an operation has changed it in place or returned a view of
            it. The other attributes do not count any more.
    """

    anchor: torch.Tensor
    left: int
    right: int
    used: int | None
    lengths: torch.Tensor | None
    visible_keys: torch.Tensor | None
    sequences: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    runs: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    changed: torch.Tensor | None
    _dense: torch.Tensor | None  # kept for the next operation
    _by_heads: dict[int, Any]  # kept for the next layer: the sequences of heads.py

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        *,
        anchor: torch.Tensor,
        left: int = -1,
        right: int = -1,
        used: int | None = None,
        max_seqlen_q: int = 0,
        max_seqlen_k: int = 0,
        dtype: torch.dtype = torch.bool,
        **tensors: torch.Tensor | None,
    ) -> CompactMask:
        device = anchor.device
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        tensors["anchor"] = anchor
        mask.left, mask.right, mask.used = left, right, used
        mask.max_seqlen_q, mask.max_seqlen_k = max_seqlen_q, max_seqlen_k
        for name in _TENSORS:
            setattr(mask, name, tensors.get(name))
        mask._dense = None
        mask._by_heads = {}
        return mask

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        bounds = f"left={self.left}, right={self.right}, used={self.used}"
        return f"CompactMask({tuple(self.shape)}, {bounds}, packs_rows={packs_rows(self)})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        given = [name for name in _TENSORS if getattr(self, name) is not None]
        return given, tuple(getattr(self, name) for name in _NUMBERS)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict, numbers: tuple, size, stride) -> CompactMask:
        return cls(size, **dict(zip(_NUMBERS, numbers, strict=True)), **inner)

    @classmethod
    def __metadata_guard__(cls, traced: tuple, given: tuple) -> bool:
        """Returns whether a graph of torch.compile holds for a mask with other numbers: it reads
        all but those of the longest sequences.
        """
        return traced[:-2] == given[:-2]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _ADDS:
            _refuse_adding_to_scores(args)
        first = args[0] if args else None
        if isinstance(first, cls) and first.changed is None:
            if func in _KEPT:
                return first._on(first.device)
            if _only_moves(func, first.dtype, kwargs):
                return first._on(kwargs.get("device") or first.device)
        shared = func._schema.is_mutable or any(
            result.alias_info is not None for result in func._schema.returns
        )

        def dense(value: Any) -> Any:
            if not isinstance(value, cls):
                return value
            mask = _as_it_stands(value)
            if shared:
                value.changed = mask
            return mask

        return func(*tree_map(dense, args), **tree_map(dense, kwargs))

    def _on(self, device: torch.device) -> CompactMask:
        """Returns a mask with the same description on a device."""
        names, numbers = self.__tensor_flatten__()
        inner = {name: getattr(self, name).to(device) for name in names}
        return self.__tensor_unflatten__(inner, numbers, self.shape, None)


# torch.compile does not trace methods of a tensor like this, but functions.


def packs_rows(mask: CompactMask) -> bool:
    """Returns whether attention needs the rows as packed sequences."""
    return mask.cu_seqlens_q is not None


def is_pattern(mask: CompactMask) -> bool:
    """Returns whether the mask hides no more than the future, what lies outside of a window, and
    keys that are not in use yet.
    """
    parts = mask.changed, mask.visible_keys, mask.sequences, mask.cu_seqlens_q
    return all(part is None for part in parts)


def dense_mask(mask: CompactMask) -> torch.Tensor:
    """Returns which keys a query sees, (batch, 1, q_length, kv_length), bool; or the mask as an
    operation has left it.
    """
    if mask.changed is not None:
        return mask.changed
    if torch.compiler.is_compiling():
        return _dense(mask)
    if mask._dense is None:
        mask._dense = _dense(mask)
    return mask._dense


def _as_it_stands(mask: CompactMask) -> torch.Tensor:
    """Returns the mask that this one stands for, in its dtype."""
    seen = dense_mask(mask)
    if mask.changed is not None or mask.dtype == torch.bool:
        return seen
    lowest = torch.finfo(mask.dtype).min
    return torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, lowest)


def _refuse_adding_to_scores(addends: tuple) -> None:
    """Raises the error for a boolean mask that is added to scores, which would hide nothing.

    Raises:
        ValueError: one addend is a boolean mask, and the other has floating numbers.
    """
    tensors = [addend for addend in addends if isinstance(addend, torch.Tensor)]
    masks = [one for one in tensors if isinstance(one, CompactMask) and one.dtype == torch.bool]
    if masks and any(one.is_floating_point() for one in tensors):
        raise ValueError(
            "a boolean mask was added to the scores of a model that computes attention by itself: "
            'load it with attn_implementation="eager" or "sdpa"'
        )


def _only_moves(func: Any, dtype: torch.dtype, kwargs: dict) -> bool:
    """Returns whether the operation copies the mask to another device as it is."""
    return (
        func is torch.ops.aten._to_copy.default
        and kwargs.get("dtype") in (None, dtype)
        and set(kwargs) <= {"dtype", "device", "layout", "non_blocking"}
    )


def _dense(mask: CompactMask) -> torch.Tensor:
    batch, _, q_length, kv_length = mask.shape
    q = torch.arange(q_length, device=mask.device)[:, None]
    k = torch.arange(kv_length, device=mask.device)
    in_use = kv_length if mask.used is None else mask.used
    if mask.lengths is not None:
        in_use = mask.lengths[:, None, None, None]
    distance = k - (q + (in_use - q_length))
    seen = torch.ones(batch, 1, q_length, kv_length, dtype=torch.bool, device=mask.device)
    if mask.right >= 0:
        seen = seen & (distance <= mask.right)
    if mask.left >= 0:
        seen = seen & (distance >= -mask.left)
    if mask.visible_keys is not None:
        seen = seen & mask.visible_keys[:, None, None, :]
    if mask.sequences is not None:
        of_keys = mask.sequences[:, None, None, :]
        seen = seen & (mask.sequences[:, None, kv_length - q_length :, None] == of_keys)
    return seen
