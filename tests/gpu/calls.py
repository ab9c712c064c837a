"""Defines the ways into the kernels: the low-level aten ops, the SDPA aten ops, this library's own
op, and F.scaled_dot_product_attention with autograd."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from cases import Inputs, Problem, poison
from reference import Result
from torch.nn.attention import SDPBackend, sdpa_kernel

aten = torch.ops.aten
own = torch.ops.fa4_ext
# Since 2.12 torch has the op that writes into an output, and block_table.
TORCH_2_12 = hasattr(aten, "_flash_attention_forward_no_dropout_inplace")


@contextmanager
def deterministic(enabled: bool = True):
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def flash_forward(
    problem: Problem,
    x: Inputs,
    *,
    dropout_p: float = 0.0,
    return_debug_mask: bool = False,
    **options,
):
    """Calls `_flash_attention_forward` and returns (out, lse, rng_state, unused, debug_mask).
    Absent window bounds are None."""
    left, right = (None if bound < 0 else bound for bound in problem.window)
    options = {
        "scale": problem.scale,
        "window_size_left": left,
        "window_size_right": right,
    } | options
    return aten._flash_attention_forward(
        x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, problem.max_q, problem.max_k,
        dropout_p, problem.is_causal, return_debug_mask, **options,
    )  # fmt: skip


def explained(
    problem: Problem, x: Inputs, *, backward: bool = False, speed_rules: bool = False
) -> tuple[bool, str, str]:
    """Returns whether one of our kernels runs the forward or the backward, that kernel's name, and
    why not."""
    left, right = problem.window
    return torch.ops.fa4_ext.explain(
        x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, problem.max_q, problem.max_k, 0.0,
        problem.is_causal, False, problem.scale,
        left, right, None, None, None, None, deterministic=False, backward=backward,
        speed_rules=speed_rules, capability=0, sm_count=0,
        peer="cudnn" if problem.top_left or x.bias is not None else "flash", attn_mask=x.bias,
    )[:3]  # fmt: skip


def planned(problem: Problem, x: Inputs) -> str:
    """Returns which of our kernels the forward gets: forward, or decode for few queries."""
    _, kernel, _ = explained(problem, x)
    return kernel.split("_")[1]


def flash_forward_into(out: torch.Tensor, problem: Problem, x: Inputs, **options) -> torch.Tensor:
    """Calls `_flash_attention_forward_no_dropout_inplace`, of torch 2.12 and later, and returns
    lse."""
    left, right = (None if bound < 0 else bound for bound in problem.window)
    options = {
        "scale": problem.scale,
        "window_size_left": left,
        "window_size_right": right,
    } | options
    return aten._flash_attention_forward_no_dropout_inplace(
        out, x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, problem.max_q, problem.max_k,
        0.0, problem.is_causal, False, **options,
    )  # fmt: skip


def _pages_apart(like, k, v, pages: int, rows: int):
    """Each page has a page of something else behind it."""
    return [like.new_empty((pages, 2 * rows, *size))[:, :rows] for size in (k, v)]


def _halves(like, k, v, pages: int, rows: int):
    """Keys and values are halves of one last dimension."""
    cache = like.new_empty((pages, rows, k[0], k[1] + v[1]))
    return [cache[..., : k[1]], cache[..., k[1] :]]


def _stacked(like, k, v, pages: int, rows: int):
    """Keys and values of a page lie one behind the other."""
    cache = like.new_empty((pages, 2, rows, *k))
    return [cache[:, 0], cache[:, 1, ..., : v[1]]]


def _heads_first(like, k, v, pages: int, rows: int):
    """Each head of a page has its rows next to each other."""
    sizes = ((heads, rows, head_dim) for heads, head_dim in (k, v))
    return [like.new_empty((pages, *size)).transpose(1, 2) for size in sizes]


def _contiguous(like, k, v, pages: int, rows: int):
    return [like.new_empty((pages, rows, *size)) for size in (k, v)]


# How caches of keys and values, [pages, page_size, heads_kv, head_dim], lie in memory.
CACHES = {
    "contiguous": _contiguous,
    "pages_apart": _pages_apart,
    "halves": _halves,
    "stacked": _stacked,
    "heads_first": _heads_first,
}


def paged(
    problem: Problem,
    x: Inputs,
    page_size: int,
    *,
    spare: int = 3,
    cache: str = "contiguous",
    nowhere: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Makes caches of keys and values with NaN where none is, and the block_table. Its pages are in
    a random order. Entries of the table beyond a sequence's pages are `nowhere`."""
    counts = [-(-length // page_size) for length in problem.seqlens_k]
    order = torch.randperm(sum(counts) + spare).tolist()
    table = torch.full((problem.batch, max(counts) + 1), nowhere, dtype=torch.int32)
    packed_tensors = x.k, x.v
    shapes = (packed.shape[1:] for packed in packed_tensors)
    caches = CACHES[cache](x.q, *shapes, len(order), page_size)
    for one in caches:
        one.fill_(float("nan"))
    row = 0
    for sequence, (length, count) in enumerate(zip(problem.seqlens_k, counts, strict=True)):
        for page in range(count):
            table[sequence, page] = order.pop()
            rows = min(page_size, length - page * page_size)
            for one, packed in zip(caches, packed_tensors, strict=True):
                one[table[sequence, page], :rows] = packed[row : row + rows]
            row += rows
    return *caches, table.to(x.q.device)


def lengths_of_pages(problem: Problem, x: Inputs, by: str) -> dict[str, torch.Tensor | None]:
    """Returns the lengths of keys in pages, as `by` says: seqused_k or cum_seq_k."""
    used = torch.tensor(problem.seqlens_k, dtype=torch.int32, device=x.q.device)
    return {
        "seqused_k": used if by == "seqused_k" else None,
        "cu_seqlens_k": x.cu_seqlens_k if by == "cum_seq_k" else None,
    }


def flash_forward_paged(
    problem: Problem,
    x: Inputs,
    page_size: int,
    *,
    by: str = "seqused_k",
    cache: str = "contiguous",
    nowhere: int = -1,
    **options,
) -> Result:
    """Calls `flash_forward` with keys and values in pages, where torch takes them, else
    `own_forward`."""
    k, v, table = paged(problem, x, page_size, cache=cache, nowhere=nowhere)
    lengths = lengths_of_pages(problem, x, by)
    cached = replace(x, k=k, v=v, cu_seqlens_k=lengths["cu_seqlens_k"])
    forward = flash_forward if TORCH_2_12 else own_forward
    known = {"block_table": table, "seqused_k": lengths["seqused_k"]}
    return Result(*forward(problem, cached, **known, **options)[:2])


def flash_backward(problem: Problem, x: Inputs, forward, *, dropout_p: float = 0.0, **options):
    """Calls `_flash_attention_backward` on the outputs of `flash_forward` and returns (dq, dk,
    dv)."""
    out, lse, rng_state, unused, _ = forward
    left, right = (None if bound < 0 else bound for bound in problem.window)
    options = {
        "scale": problem.scale,
        "window_size_left": left,
        "window_size_right": right,
    } | options
    return aten._flash_attention_backward(
        x.do, x.q, x.k, x.v, out, lse, x.cu_seqlens_q, x.cu_seqlens_k, problem.max_q, problem.max_k,
        dropout_p, problem.is_causal, rng_state, unused, **options,
    )  # fmt: skip


def sdpa_forward(problem: Problem, x: Inputs):
    """Calls `_scaled_dot_product_flash_attention` and returns its nine outputs. Tensors go in as
    [batch, heads, seqlen, head_dim] views."""
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    return aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, problem.is_causal, False, scale=problem.scale
    )


def sdpa_backward(problem: Problem, x: Inputs, forward):
    """Calls `_scaled_dot_product_flash_attention_backward` and returns (dq, dk, dv), each [batch,
    heads, seqlen, head_dim]."""
    out, lse, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, _ = forward
    do, q, k, v = (t.transpose(1, 2) for t in (x.do, x.q, x.k, x.v))
    return aten._scaled_dot_product_flash_attention_backward(
        do,
        q,
        k,
        v,
        out,
        lse,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        0.0,
        problem.is_causal,
        rng_state,
        unused,
        scale=problem.scale,
    )


def cudnn_forward(problem: Problem, x: Inputs, *, dropout_p: float = 0.0):
    """Calls `_scaled_dot_product_cudnn_attention` and returns its nine outputs."""
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    return aten._scaled_dot_product_cudnn_attention(
        q, k, v, x.bias, True, dropout_p, problem.is_causal, False, scale=problem.scale
    )


def cudnn_backward(problem: Problem, x: Inputs, forward):
    """Calls `_scaled_dot_product_cudnn_attention_backward` and returns (dq, dk, dv)."""
    out, lse, cum_seq_q, cum_seq_k, max_q, max_k, seed, offset, _ = forward
    do, q, k, v = (t.transpose(1, 2) for t in (x.do, x.q, x.k, x.v))
    return aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, out, lse, seed, offset, x.bias, cum_seq_q, cum_seq_k, max_q, max_k, 0.0,
        problem.is_causal, scale=problem.scale,
    )  # fmt: skip


def efficient_forward(problem: Problem, x: Inputs):
    """Calls `_scaled_dot_product_efficient_attention` and returns its four outputs."""
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, x.bias, True, 0.0, problem.is_causal, scale=problem.scale
    )


def efficient_backward(problem: Problem, x: Inputs, forward):
    """Calls `_scaled_dot_product_efficient_attention_backward` and returns (dq, dk, dv)."""
    do, q, k, v = (t.transpose(1, 2) for t in (x.do, x.q, x.k, x.v))
    return aten._scaled_dot_product_efficient_attention_backward(
        do, q, k, v, x.bias, *forward, 0.0, [True, True, True, False], problem.is_causal,
        scale=problem.scale,
    )[:3]  # fmt: skip


def own_forward(problem: Problem, x: Inputs, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls `fa4_ext::attention` and returns (out, lse)."""
    options = {"seqused_k": None, "block_table": None, "num_splits": 0} | options
    return own.attention(
        x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, problem.max_q, problem.max_k,
        options["seqused_k"], options["block_table"], problem.scale, problem.is_causal,
        *problem.window, options["num_splits"], False,
    )  # fmt: skip


def own_backward(problem: Problem, x: Inputs, forward, *, deterministic: bool = False):
    """Calls `fa4_ext::attention_backward` on the results of `own_forward`."""
    return own.attention_backward(
        x.do, x.q, x.k, x.v, *forward, x.cu_seqlens_q, x.cu_seqlens_k, problem.max_q,
        problem.max_k, problem.scale, problem.is_causal, *problem.window, deterministic,
    )  # fmt: skip


def run_own(problem: Problem, x: Inputs, *, backward: bool, deterministic: bool = False) -> Result:
    return _run(
        own_forward, partial(own_backward, deterministic=deterministic), problem, x, backward
    )


def dense_cache(problem: Problem, x: Inputs, rows: int) -> list[torch.Tensor]:
    """Makes caches of keys and values, [batch, rows, heads_kv, head_dim], with NaN where none is
    and heads outside rows, as transformers' static cache has it."""
    caches = []
    for packed in (x.k, x.v):
        heads, head_dim = packed.shape[1:]
        cache = packed.new_full((problem.batch, heads, rows, head_dim), float("nan"))
        cache = cache.transpose(1, 2)
        for sequence, keys in enumerate(packed.split(problem.seqlens_k)):
            cache[sequence, : len(keys)] = keys
        caches.append(cache)
    return caches


def own_forward_of_cache(problem: Problem, x: Inputs, rows: int, **options) -> Result:
    """Calls `own_forward` with the keys and values of a packed problem in a dense cache. All its
    sequences have as many queries."""
    k, v = dense_cache(problem, x, rows)
    lengths = torch.tensor(problem.seqlens_k, dtype=torch.int32, device=x.q.device)
    q = x.q.unflatten(0, (problem.batch, -1))
    cached = replace(x, q=q, k=k, v=v, cu_seqlens_q=None, cu_seqlens_k=None)
    out, lse = own_forward(problem, cached, seqused_k=lengths, **options)
    return Result(out.flatten(0, 1), lse.transpose(0, 1).flatten(1))


def run_cudnn_op(problem: Problem, x: Inputs, *, backward: bool) -> Result:
    return _sequence_first(_run(cudnn_forward, cudnn_backward, problem, x, backward))


def run_efficient_op(problem: Problem, x: Inputs) -> Result:
    result = _sequence_first(_run(efficient_forward, efficient_backward, problem, x, True))
    # Rows without keys have a logsumexp of +inf there.
    lse = result.lse[..., : problem.max_q]
    return replace(result, lse=lse.masked_fill(lse.isposinf(), float("-inf")))


def run_flash(problem: Problem, x: Inputs, *, backward: bool, **options) -> Result:
    """Runs both ops. `options` replace what the problem says."""
    return _run(
        partial(flash_forward, **options), partial(flash_backward, **options), problem, x, backward
    )


def run_sdpa_op(problem: Problem, x: Inputs, *, backward: bool) -> Result:
    return _sequence_first(_run(sdpa_forward, sdpa_backward, problem, x, backward))


def _sequence_first(result: Result) -> Result:
    """Returns the result of a heads-first op in the layout of `_flash_attention_forward`."""
    heads_first = {
        name: tensor.transpose(1, 2)
        for name in ("out", "dq", "dk", "dv")
        if (tensor := getattr(result, name)) is not None
    }
    lse = result.lse.squeeze(-1) if result.lse.dim() == 4 else result.lse
    return replace(result, lse=lse, **heads_first)


def _run(forward_op, backward_op, problem: Problem, x: Inputs, backward: bool) -> Result:
    poison(x)
    forward = forward_op(problem, x)
    gradients = ()
    if backward:
        poison(x)
        gradients = backward_op(problem, x, forward)
    return Result(*forward[:2], *gradients)


def run_autograd(
    problem: Problem,
    x: Inputs,
    *,
    backward: bool,
    backend: SDPBackend | None = SDPBackend.FLASH_ATTENTION,
) -> Result:
    """Runs F.scaled_dot_product_attention and autograd. With `backend` None it is the plain call.
    The result has no lse."""
    q, k, v = (t.detach().transpose(1, 2).requires_grad_(backward) for t in (x.q, x.k, x.v))
    poison(x)
    options = dict(
        attn_mask=x.bias,
        is_causal=problem.is_causal,
        scale=problem.scale,
        enable_gqa=problem.heads != problem.heads_kv,
    )
    if backend is None:
        out = F.scaled_dot_product_attention(q, k, v, **options)
    else:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, **options)
    gradients = ()
    if backward:
        poison(x)
        gradients = torch.autograd.grad(out, (q, k, v), x.do.transpose(1, 2))
    out, *gradients = (t.detach().transpose(1, 2) for t in (out, *gradients))
    return Result(out, None, *gradients)
