"""This module completes the op `attention`, whose CUDA implementation is the native library's: here
are the fake implementations and the gradients, and the op with an attention sink.

A sink is a logit a head that takes part in the softmax and has no value. With lse the logsumexp of
a row's scores, it turns the output o into o * exp(lse - lse'), where lse' = logaddexp(lse, sink).
The gradients of q, k and v follow from o' and lse' as they follow from o and lse without a sink, so
that one backward serves both.

Forward-mode differentiation raises an error, so that tangents are not taken for zero.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.autograd import forward_ad

from . import _logsumexp
from ._native import NAMESPACE, ops

Results: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? seqused_k, Tensor? block_table, float? softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, int num_splits, bool deterministic"
)


def _output_like(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Returns an output in q's order of dimensions, with v's head dim."""
    if q.shape[-1] == v.shape[-1]:
        return torch.empty_like(q)
    outermost_first = sorted(range(q.dim()), key=lambda dim: -q.stride(dim))
    shape = (*q.shape[:-1], v.shape[-1])
    return torch.empty_permuted(shape, outermost_first, dtype=q.dtype, device=q.device)


def _fake_attention(q, k, v, *options) -> Results:
    *batch, rows, heads, _ = q.shape
    return _output_like(q, v), q.new_empty((*batch, heads, rows), dtype=torch.float32)


def _fake_attention_with_sink(q, k, v, learnable_sink, *options) -> Results:
    return _fake_attention(q, k, v)


def _fake_backward(grad_out, q, k, v, *others) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention_with_sink(q, k, v, learnable_sink, *options) -> Results:
    out, lse = ops.attention(q, k, v, *options)
    return add_sink(out, lse, learnable_sink)


def add_sink(out: torch.Tensor, lse: torch.Tensor, learnable_sink: torch.Tensor) -> Results:
    """Turns the results without a sink into those with it. It writes into `out`."""
    # A row without keys has an lse of -inf, or where PyTorch's kernel ran, of inf. A finite sink
    # keeps it at zero.
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    sink = learnable_sink.float().clamp(min=torch.finfo(torch.float32).min)
    lse_with_sink = torch.logaddexp(lse, sink[:, None])
    share_of_keys = torch.exp(lse - lse_with_sink)
    return out.mul_(share_of_keys.transpose(-1, -2).unsqueeze(-1)), lse_with_sink


class _Gradient(torch.autograd.Function):
    """Attention, with a sink or (None) without. torch.library.register_autograd would read the
    schema in each call, which takes longer than all the rest."""

    @staticmethod
    def forward(ctx, q, k, v, learnable_sink, *options) -> Results:
        (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, block_table, scale,
            causal, left, right, _, deterministic) = options  # fmt: skip
        for name, given in (("seqused_k", seqused_k), ("block_table", block_table)):
            if given is not None:
                raise NotImplementedError(
                    f"{name} has no backward: call it under torch.no_grad(), or with tensors that "
                    "do not require grad"
                )
        out, lse = _below_autograd(q, k, v, learnable_sink, *options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, learnable_sink)
        ctx.options = max_seqlen_q, max_seqlen_k, scale, causal, left, right, deterministic
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        others = (None,) * 12
        if grad_out is None and grad_lse is None:
            return (*(None,) * 4, *others)
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, learnable_sink = ctx.saved_tensors
        gradients = _logsumexp.gradients(
            grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.options
        )
        sink = None
        if ctx.needs_input_grad[3]:
            sink = _sink_gradient(grad_out, grad_lse, out, lse, cu_seqlens_q, learnable_sink)
        return (*gradients, sink, *others)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return ops.attention_backward(*arguments)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(f"{NAMESPACE}::attention has no second derivative")


def _sink_gradient(grad_out, grad_lse, out, lse, cu_seqlens_q, learnable_sink) -> torch.Tensor:
    """Returns the sum over rows of p * (dlse - delta): p is the sink's share of a row's weight,
    delta = rowsum(dO * O), dlse the gradient of the logsumexp."""
    of_scores = torch.zeros_like(lse)
    if grad_out is not None:
        delta = torch.linalg.vecdot(grad_out.float(), out.float()).transpose(-1, -2)
        of_scores = of_scores - delta
    if grad_lse is not None:
        of_scores = of_scores + grad_lse
    of_rows = torch.exp(learnable_sink.float()[:, None] - lse) * of_scores
    if cu_seqlens_q is None:
        return of_rows.sum((0, 2)).to(learnable_sink.dtype)
    # Nobody wrote the rows of a packed output that belong to no sequence.
    rows = torch.arange(of_rows.shape[-1], device=of_rows.device)
    in_a_sequence = (rows >= cu_seqlens_q[0]) & (rows < cu_seqlens_q[-1])
    return of_rows.where(in_a_sequence, 0.0).sum(-1).to(learnable_sink.dtype)


def _below_autograd(q, k, v, learnable_sink, *options) -> Results:
    with torch._C._AutoDispatchBelowAutograd():
        if learnable_sink is None:
            return ops.attention(q, k, v, *options)
        return ops.attention_with_sink(q, k, v, learnable_sink, *options)


def _refuse_tangents(*inputs: torch.Tensor) -> None:
    """Raises the error for forward-mode differentiation, whose tangents would be dropped."""
    if forward_ad._current_level < 0:  # no level is open, so that there are no tangents
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
        raise NotImplementedError(f"{NAMESPACE}::attention has no forward-mode derivative")


def _autograd(q, k, v, learnable_sink, *options) -> Results:
    inputs = (q, k, v) if learnable_sink is None else (q, k, v, learnable_sink)
    _refuse_tangents(*inputs)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _Gradient.apply(q, k, v, learnable_sink, *options)
    return _below_autograd(q, k, v, learnable_sink, *options)


def _attention_autograd(q, k, v, *options) -> Results:
    return _autograd(q, k, v, None, *options)


def _backward_autograd(*arguments):
    _refuse_tangents(*arguments[:6])
    if torch.is_grad_enabled():  # somebody asks for a graph of the backward
        return _NoSecondDerivative.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return ops.attention_backward(*arguments)


def _complete() -> torch.library.Library | None:
    """Returns the registrations, or None where another copy of a package for the Hub made them."""
    if hasattr(ops, "attention_with_sink"):
        return None
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(
        f"attention_with_sink(Tensor q, Tensor k, Tensor v, Tensor learnable_sink, {_OPTIONS}) -> "
        "(Tensor out, Tensor softmax_lse)"
    )
    library.impl("attention_with_sink", _attention_with_sink, "CompositeExplicitAutograd")
    library.impl("attention", _attention_autograd, "Autograd")
    library.impl("attention_with_sink", _autograd, "Autograd")
    library.impl("attention_backward", _backward_autograd, "Autograd")
    for name, fake in (
        ("attention", _fake_attention),
        ("attention_with_sink", _fake_attention_with_sink),
        ("attention_backward", _fake_backward),
    ):
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


_kept = _complete()  # the registrations end with it
