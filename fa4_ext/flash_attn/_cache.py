"""The function that reads keys and values from a cache."""

from __future__ import annotations

import functools
import operator

import torch

from . import _arguments
from ._functions import Results, attend
from ._native import disabled_kernels
from ._planner import capability_and_sms, has_kernel


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cache_seqlens: int | torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    return_lse: bool = False,
    **others,
) -> Results:
    """Computes attention to the keys and values in a cache, for inference, and writes new ones
    into the cache first where they are given.

    Any number of queries reads pages in place, and few read a dense cache in place: up to 512
    queries, and up to 4,096 divided by the number of query heads on each key/value head. Strides
    must be multiples of 8 elements. Others work on a copy of a dense cache.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16 or bfloat16.
        k_cache: (batch, seqlen_cache, heads_k, head_dim), or with a table (pages, page_size,
            heads_k, head_dim); a page_size that is a multiple of 16 has kernels.
        v_cache: as k_cache, with head_dim_v.
        k: (batch, seqlen_new, heads_k, head_dim): keys that go into the cache behind those in use.
            The cache must have room for them.
        v: as k, with head_dim_v.
        cache_seqlens: (batch,), int32, or a number: how many keys of each sequence are in use,
            without new ones. None means all; a table and new keys need it.
        block_table: (batch, pages), int32: each sequence's pages. Entries behind the last page in
            use may hold anything.
        page_table: flash-attn 3's name for block_table.
        softmax_scale, window_size, softcap, learnable_sink, num_splits, others: as in
            `flash_attn_func`.
        causal: whether each query sees the keys up to its own position only. The last query has the
            position of the last key in use.
        return_softmax_lse: flash-attn 2's and 3's name for return_lse.
        return_lse: whether to return the logsumexp, too.

    Returns:
        The output, (batch, seqlen_q, heads, head_dim_v), or the output and the logsumexp, (batch,
        heads, seqlen_q) in float32.

    Raises:
        NotImplementedError: an argument asks for what is not supported, or a tensor for a gradient.
        TypeError, ValueError, RuntimeError: as in `flash_attn_func`.
    """
    _arguments.refuse_others("flash_attn_with_kvcache", others)
    if softcap:
        _arguments.refuse_unless_neutral("softcap", softcap, (0.0,))
    _refuse_gradients(
        q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, learnable_sink=learnable_sink
    )
    _check_new(q, k_cache, v_cache, k, v)
    table = _arguments.page_table(block_table, page_table)
    if cache_seqlens is None and (k is not None or table is not None):
        raise ValueError("cache_seqlens must be given with new keys, and with block_table")
    left, right = _arguments.window_bounds(window_size)
    used = _lengths(cache_seqlens, q)
    if k is not None and used is not None:
        _append(k_cache, k, used, table)
        _append(v_cache, v, used, table)
        used = used + k.shape[1]
    mask = softmax_scale, causal, left, right, _arguments.split_count(num_splits), False
    if table is not None:
        out, lse = _attend_packed(q, k_cache, v_cache, learnable_sink, None, used, table, mask)
    elif used is None or reads_in_place(q, k_cache, v_cache):
        lengths = None, None, q.shape[1], k_cache.shape[1], used, None
        out, lse = attend(q, k_cache, v_cache, learnable_sink, *lengths, *mask)
    else:
        starts = _starts(q.shape[0], k_cache.shape[1], q.device)
        k_cache, v_cache = (cache.flatten(0, 1) for cache in (k_cache, v_cache))
        out, lse = _attend_packed(q, k_cache, v_cache, learnable_sink, starts, used, None, mask)
    return (out, lse) if return_lse or return_softmax_lse else out


def _refuse_gradients(**tensors: torch.Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                f"flash_attn_with_kvcache has no backward, and {name} requires grad: call it under "
                "torch.no_grad(), or with detached tensors"
            )


def _check_new(q, k_cache, v_cache, k: torch.Tensor | None, v: torch.Tensor | None) -> None:
    """Checks that new keys and values fit the cache, which indexing would not."""
    if k is None and v is None:
        return
    if k is None or v is None:
        raise ValueError("k and v must be given together")
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expected = (q.shape[0], k.shape[1], *cache.shape[2:])
        if new.shape != expected:
            raise ValueError(
                f"{name} must have the shape {tuple(expected)}, q's batch, k's length and "
                f"{name}_cache's heads and head_dim; has {tuple(new.shape)}"
            )


def _lengths(cache_seqlens: int | torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    if cache_seqlens is None:
        return None
    if not isinstance(cache_seqlens, torch.Tensor):
        _arguments.length("cache_seqlens", cache_seqlens, 0)
        return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    if cache_seqlens.shape != (q.shape[0],):
        raise ValueError(
            f"cache_seqlens must have the shape ({q.shape[0]},), a number for each sequence, has "
            f"{tuple(cache_seqlens.shape)}"
        )
    return cache_seqlens.to(torch.int32)


def _append(
    cache: torch.Tensor, new: torch.Tensor, used: torch.Tensor, table: torch.Tensor | None
) -> None:
    """Writes rows into a cache, behind those in use."""
    rows = used[:, None].long() + torch.arange(new.shape[1], device=new.device)
    if table is None:
        where = torch.arange(new.shape[0], device=new.device)[:, None].expand_as(rows)
    else:
        where = table.gather(1, rows // cache.shape[1]).long()
        rows = rows % cache.shape[1]
    cache.index_put_((where, rows), new.to(cache.dtype))


def _starts(batch: int, rows: int, device: torch.device) -> torch.Tensor:
    """Returns the cu_seqlens of sequences that all have so many rows."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * rows


def _attend_packed(q, k, v, learnable_sink, cu_seqlens_k, used, table, mask):
    """Attends with the queries as packed sequences. The results have the shapes of dense ones."""
    batch, rows, heads, _ = q.shape
    keys = k.shape[1] * table.shape[1] if table is not None else k.shape[0] // batch
    out, lse = attend(
        q.flatten(0, 1), k, v, learnable_sink, _starts(batch, rows, q.device), cu_seqlens_k, rows,
        keys, used, table, *mask,
    )  # fmt: skip
    return out.unflatten(0, (batch, rows)), lse.view(heads, batch, rows).transpose(0, 1)


def reads_in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Returns whether a kernel reads the keys in use from where they lie in a dense cache."""
    if q.device.type != "cuda":
        return True
    # TMA takes addresses and strides of 16 bytes. An allocation begins at one. A compiled program
    # cannot ask for the offset; the op refuses one that does not fit.
    elements = [*k.stride()[:-1], *v.stride()[:-1]]
    if not torch.compiler.is_compiling():
        elements += k.storage_offset(), v.storage_offset()
    if any(count % 8 for count in elements):
        return False
    # Where a compiled program has symbols for them, they become constants of it.
    sizes = map(operator.index, (q.shape[2], k.shape[2], q.shape[3], v.shape[3]))
    return q.shape[1] <= _most_queries(q.device, q.dtype, *sizes)


def _most_queries(device, dtype, heads: int, heads_k: int, head_dim: int, head_dim_v: int) -> int:
    """Returns how many queries of a sequence a kernel takes with a dense cache; 0 for none."""
    capability, sm_count = capability_and_sms(device)
    sizes = heads, heads_k, head_dim, head_dim_v
    return _asked(disabled_kernels(), capability, sm_count, dtype, *sizes)


# torch.compile takes the answer for a constant. torch.compiler.assume_constant_result says this,
# too, and imports the compiler, which takes more than a second.
_most_queries._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _asked(disabled, capability, sm_count, dtype, heads, heads_k, head_dim, head_dim_v) -> int:
    def supported(rows: int) -> bool:
        sizes = (heads, heads_k), (head_dim, head_dim_v)
        return has_kernel(rows, *sizes, dtype, capability, sm_count, keys_in_use=True)

    least, most = 0, 1
    while supported(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if supported(middle) else (least, middle)
    return least
