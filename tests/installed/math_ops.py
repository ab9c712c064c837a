"""Implements torch.ops.fa4_ext.attention for tensors of the CPU in plain math, in fp32 or the
inputs' wider dtype, so that what builds on the op is tested without a GPU. Importing this module
registers it. `register` does so for a package with another namespace.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from fa4_ext.flash_attn._ops import _output_like

FAR = 1 << 30
calls: list[str] = []  # the ops that ran; tests clear it


def rows_of(cu_seqlens: torch.Tensor, total: int) -> list[slice]:
    """Returns where each sequence lies in a packed tensor."""
    bounds = cu_seqlens.clamp(0, total).tolist()
    return [slice(a, max(a, b)) for a, b in itertools.pairwise(bounds)]


def queries_of(q: torch.Tensor, cu_q: torch.Tensor | None) -> list:
    """Returns an index into q and its like for each sequence."""
    return list(range(q.shape[0])) if cu_q is None else rows_of(cu_q, q.shape[0])


def keys_of(cache: torch.Tensor, batch: int, cu_k, used, table) -> Iterator[torch.Tensor]:
    """Yields each sequence's keys or values, [rows, heads, head_dim]; only pages are copied."""
    for i in range(batch):
        if table is not None:
            rows, most = cache[table[i].clamp(min=0).long()].flatten(0, 1), None
            if cu_k is not None:
                most = int(cu_k[i + 1] - cu_k[i])
        else:
            index = i if cu_k is None else rows_of(cu_k, cache.shape[0])[i]
            rows, most = cache[index], None
        if used is not None:
            most = max(0, int(used[i]))
        yield rows[:most]


def scores_of(q, k, scale, causal, left, right) -> torch.Tensor:
    """Returns the scaled and masked scores [heads, rows, keys] of one sequence."""
    bounds = [FAR if size < 0 else size for size in (left, right)]
    distance = torch.arange(k.shape[0]) - torch.arange(q.shape[0])[:, None]
    distance = distance - (k.shape[0] - q.shape[0])  # aligned bottom-right
    hidden = (distance > (0 if causal else bounds[1])) | (distance < -bounds[0])
    scores = q.transpose(0, 1) @ per_query_head(k, q).transpose(1, 2)
    return (scores * (scale or q.shape[-1] ** -0.5)).masked_fill(hidden, -math.inf)


def per_query_head(k: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Repeats the heads of one sequence's keys or values, and puts them first."""
    return k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1)


def weights_of(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return (scores - lse.where(lse > -math.inf, 0.0)[..., None]).exp()


def widened(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def attention(
    q, k, v, cu_q, cu_k, max_q, max_k, used, table, scale, causal, left, right, splits, same_bits
):
    calls.append("attention")
    *batch, total, heads, _ = q.shape
    out = _output_like(q, v).fill_(math.nan)  # rows of no sequence stay as they are
    lse = q.new_full((*batch, heads, total), math.nan, dtype=torch.float32)
    where = queries_of(q, cu_q)
    q, k, v = widened(q, k, v)
    keys, values = (keys_of(cache, len(where), cu_k, used, table) for cache in (k, v))
    for index, one_k, one_v in zip(where, keys, values, strict=True):
        scores = scores_of(q[index], one_k, scale, causal, left, right)
        one_lse = scores.float().logsumexp(-1)
        weights = weights_of(scores, one_lse)
        out[index] = (weights @ per_query_head(one_v, q[index])).transpose(0, 1)
        if cu_q is None:
            lse[index] = one_lse
        else:
            lse[:, index] = one_lse
    return out, lse


def attention_backward(
    grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal, left, right, same_bits
):
    calls.append("attention_backward")
    results = [torch.empty_like(tensor) for tensor in (q, k, v)]
    grad_out, q, k, v, out = widened(grad_out, q, k, v, out)
    grads = [torch.zeros_like(tensor) for tensor in (q, k, v)]
    where = queries_of(q, cu_q)
    caches = (keys_of(cache, len(where), cu_k, None, None) for cache in (k, v, *grads[1:]))
    for index, one_k, one_v, dk, dv in zip(where, *caches, strict=True):
        one_q, grad = q[index], grad_out[index].transpose(0, 1)
        one_lse = lse[index] if cu_q is None else lse[:, index]
        factor = scale or q.shape[-1] ** -0.5
        weights = weights_of(scores_of(one_q, one_k, scale, causal, left, right), one_lse)
        delta = (grad * out[index].transpose(0, 1)).sum(-1, keepdim=True)
        of_weights = grad @ per_query_head(one_v, one_q).transpose(1, 2) - delta
        of_scores = weights * of_weights * factor
        grads[0][index] = (of_scores @ per_query_head(one_k, one_q)).transpose(0, 1)
        groups = (-1, one_q.shape[1] // one_k.shape[1])
        of_keys = of_scores.transpose(1, 2) @ one_q.transpose(0, 1)
        dk.copy_(of_keys.unflatten(0, groups).sum(1).transpose(0, 1))
        dv.copy_((weights.transpose(1, 2) @ grad).unflatten(0, groups).sum(1).transpose(0, 1))
    return tuple(result.copy_(grad) for result, grad in zip(results, grads, strict=True))


_kept = []  # the registrations end with them


def register(namespace: str) -> None:
    library = torch.library.Library(namespace, "IMPL")
    library.impl("attention", attention, "CPU")
    library.impl("attention_backward", attention_backward, "CPU")
    _kept.append(library)


register("fa4_ext")
