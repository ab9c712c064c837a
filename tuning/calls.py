"""Defines the calls that are measured: their tensors, their functions, and what a row says about
them."""

from __future__ import annotations

import torch

import fa4_ext
from fa4_ext.bench.correctness import DTYPES, make_cu_seqlens
from fa4_ext.bench.shapes import Shape

aten = torch.ops.aten


def make_inputs(p: Shape, dtype: str) -> list[torch.Tensor]:
    """Makes q, k, v and dO in the layout of `_flash_attention_forward`."""
    rows_q = (p.total_q,) if p.layout == "varlen" else (p.batch, p.seqlen_q)
    rows_k = rows_q if p.layout == "varlen" else (p.batch, p.seqlen_k)
    q = (*rows_q, p.heads, p.head_dim)
    k = (*rows_k, p.heads_kv, p.head_dim)
    return [torch.randn(size, dtype=DTYPES[dtype], device="cuda") for size in (q, k, k, q)]


def calls(p: Shape, sets: list, enabled):
    """Returns the forward and the backward as functions of a set's index. The backward uses the
    results of a forward that ran under `enabled`."""
    cu_seqlens = make_cu_seqlens(p)
    longest = (p.longest, p.longest) if p.layout == "varlen" else (p.seqlen_q, p.seqlen_k)

    def forward(i):
        q, k, v, _ = sets[i]
        return aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, *longest, 0.0, p.causal, False
        )

    with enabled():
        saved = [forward(i) for i in range(len(sets))]

    def backward(i):
        q, k, v, do = sets[i]
        out, lse, rng_state, unused, _ = saved[i]
        return aten._flash_attention_backward(
            do,
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens,
            cu_seqlens,
            *longest,
            0.0,
            p.causal,
            rng_state,
            unused,
        )

    return {"forward": forward, "backward": backward}


def explain(p: Shape, inputs: list[torch.Tensor], **options) -> fa4_ext.Explanation:
    """Explains the call."""
    q, k, v, _ = inputs
    if p.layout == "varlen":
        return fa4_ext.explain(
            q, k, v, cu_seqlens_q=make_cu_seqlens(p), max_seqlen_q=p.longest, **options
        )
    # A window that holds every key masks nothing, and makes this a call of the low-level op.
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return fa4_ext.explain(q, k, v, window_size=(-1, p.seqlen_k), **options)


def agree(outputs, others, at_most: float) -> None:
    """Raises if the outputs differ. Agreement does not prove them right; the test suite checks
    that."""
    for a, b in zip(outputs, others, strict=True):
        difference = ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-3)).item()
        if not difference <= at_most:
            raise RuntimeError(
                f"outputs differ by {difference:.2e}, at most {at_most:.1e} is allowed"
            )


def fields_of(p: Shape) -> dict:
    """Returns what a row says about its problem."""
    fields = (
        "layout",
        "batch",
        "heads",
        "heads_kv",
        "seqlen_q",
        "seqlen_k",
        "head_dim",
        "causal",
        "longest",
    )
    return {name: getattr(p, name) for name in fields} | {
        "uniform": len(set(p.lengths)) <= 1,
        "total_q": p.total_q,
    }
