"""The functions without a cache."""

from __future__ import annotations

from typing import TypeAlias

import torch

from . import _arguments, _ops
from ._native import ops

Results: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    num_splits: int = 0,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    return_lse: bool = False,
    **others,
) -> Results:
    """Computes attention of dense tensors: softmax(q @ k^T * softmax_scale) @ v.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16 or bfloat16.
        k: (batch, seqlen_k, heads_k, head_dim), q's dtype. heads is a multiple of heads_k: with
            fewer of them, query heads share a head of keys and values (GQA, MQA).
        v: (batch, seqlen_k, heads_k, head_dim_v), q's dtype.
        dropout_p: must be 0.
        softmax_scale: the factor of the scores; None means 1 / sqrt(head_dim).
        causal: whether query i sees keys up to i + seqlen_k - seqlen_q only: the mask is aligned
            bottom-right.
        window_size: how many keys to the left and to the right of its own position, aligned in the
            same way, a query sees. None and -1 mean all.
        softcap: must be 0.
        learnable_sink: (heads,), a logit for each query head that takes part in the softmax and has
            no value; any floating dtype. It may require grad.
        num_splits: into how many parts the keys are split where there are few queries; 0 leaves it
            to the planner. With 1 a sequence has the same bits in every batch; with a table and
            many queries 1 is slower than 0.
        deterministic: whether the backward gives the same bits in every run.
            torch.use_deterministic_algorithms(True) asks for the same.
        return_attn_probs: flash-attn 3's name for return_lse. flash-attn 2 returns a third value,
            these functions do not.
        return_lse: whether to return the logsumexp, too.
        others: further arguments of flash-attn's function, at values that ask for nothing.

    Returns:
        The output, (batch, seqlen_q, heads, head_dim_v), or the output and the logsumexp, (batch,
        heads, seqlen_q) in float32; flash-attn 4 always returns a pair. The logsumexp holds the
        sink, and has a gradient for head dims of at most 248; detach it where that is not wanted,
        because it slows the backward. A query that sees no key gets zeros.

    Raises:
        NotImplementedError: an argument asks for what is not supported.
        TypeError: no flash-attn up to 4.0.0b36 has such an argument.
        ValueError: window_size is not a pair of bounds, or num_splits is not a number.
        RuntimeError: no kernel covers the call, and PyTorch's flash attention does not either; or
            the native library could not be loaded.
    """
    _arguments.refuse_others("flash_attn_func", others)
    _refuse_options(dropout_p, softcap)
    left, right = _arguments.window_bounds(window_size)
    out, lse = attend(
        q, k, v, learnable_sink, None, None, q.shape[1], k.shape[1], None, None, softmax_scale,
        causal, left, right, _arguments.split_count(num_splits), deterministic,
    )  # fmt: skip
    return (out, lse) if return_lse or return_attn_probs else out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    num_splits: int = 0,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    return_lse: bool = False,
    **others,
) -> Results:
    """Computes attention of packed sequences.

    Args:
        q: (total_q, heads, head_dim), the queries of all sequences, float16 or bfloat16.
        k: (total_k, heads_k, head_dim), or with a table (pages, page_size, heads_k, head_dim); a
            page_size that is a multiple of 16 has kernels.
        v: as k, with head_dim_v.
        cu_seqlens_q: (batch + 1,), int32, on q's device: sequence i has the rows from
            cu_seqlens_q[i] to cu_seqlens_q[i + 1]. Rows of q behind the last sequence belong to
            none: their output is not written, and their gradient is 0 where a kernel of this
            library runs.
        cu_seqlens_k: the same for k and v; None with seqused_k and a table.
        max_seqlen_q: the longest sequence's number of queries, or more; None means total_q.
        max_seqlen_k: the longest sequence's number of keys, or more; None means all of them.
        seqused_k: (batch,), int32: how many keys of each sequence are in use. There is no backward.
        block_table: (batch, pages), int32: each sequence's pages of k and v. Entries behind its
            last page in use may hold anything. There is no backward.
        page_table: flash-attn 3's name for block_table.
        dropout_p, softmax_scale, causal, window_size, softcap, learnable_sink, num_splits,
            deterministic, return_attn_probs, return_lse, others: as in `flash_attn_func`, for each
            sequence.

    Returns:
        The output, (total_q, heads, head_dim_v), or the output and the logsumexp, (heads, total_q)
        in float32.

    Raises:
        NotImplementedError: an argument asks for what is not supported, such as a gradient with
            seqused_k.
        TypeError, ValueError, RuntimeError: as in `flash_attn_func`.
    """
    _arguments.refuse_others("flash_attn_varlen_func", others)
    _refuse_options(dropout_p, softcap)
    table = _arguments.page_table(block_table, page_table)
    most_keys = k.shape[0] if table is None else table.shape[1] * k.shape[1]
    left, right = _arguments.window_bounds(window_size)
    out, lse = attend(
        q, k, v, learnable_sink, cu_seqlens_q, cu_seqlens_k,
        _arguments.length("max_seqlen_q", max_seqlen_q, q.shape[0]),
        _arguments.length("max_seqlen_k", max_seqlen_k, most_keys), seqused_k, table,
        softmax_scale, causal, left, right, _arguments.split_count(num_splits), deterministic,
    )  # fmt: skip
    return (out, lse) if return_lse or return_attn_probs else out


def attend(q, k, v, learnable_sink: torch.Tensor | None, *options) -> _ops.Results:
    """Calls the op with or without a sink. `options` are those of the op `attention`.

    Raises:
        ValueError: the sink has another shape than (heads,).
    """
    if learnable_sink is None:
        return ops.attention(q, k, v, *options)
    heads = q.shape[-2]
    if learnable_sink.shape != (heads,):
        raise ValueError(
            f"learnable_sink must have the shape ({heads},), a logit for each query head, has "
            f"{tuple(learnable_sink.shape)}"
        )
    return ops.attention_with_sink(q, k, v, learnable_sink, *options)


def _refuse_options(dropout_p: float, softcap: float) -> None:
    if dropout_p:
        _arguments.refuse_unless_neutral("dropout_p", dropout_p, (0.0,))
    if softcap:
        _arguments.refuse_unless_neutral("softcap", softcap, (0.0,))
