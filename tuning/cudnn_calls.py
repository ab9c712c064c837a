"""Defines the calls of F.scaled_dot_product_attention on cuDNN and on ours."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa4_ext
from fa4_ext.bench.correctness import DTYPES
from tuning.cudnn_grid import Call

# Contexts in which F.scaled_dot_product_attention runs on cuDNN, or on ours, or raises. PyTorch's
# own order of backends, which ours leave as it is, begins with cuDNN on Hopper.
cudnn_enabled = partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
ours_enabled = partial(fa4_ext.register, fallback="error", speed_rules=False)


def make_inputs(p: Call, dtype: str) -> list[torch.Tensor]:
    """Makes q, k, v and dO in the layout of `_flash_attention_forward`, which our kernels are
    called through."""
    rows = ((p.seqlen_q, p.heads), (p.seqlen_k, p.heads_kv))
    q, k = ((p.batch, seqlen, heads, p.head_dim) for seqlen, heads in rows)
    do, v = ((p.batch, seqlen, heads, p.head_dim_v) for seqlen, heads in rows)
    return [torch.randn(size, dtype=DTYPES[dtype], device="cuda") for size in (q, k, v, do)]


def _recorded(attention, *qkv: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the output with its autograd graph, and the tensors whose gradients it has."""
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    return attention(*leaves), leaves


def explain(p: Call, inputs: list[torch.Tensor], **options) -> fa4_ext.Explanation:
    """Explains the call."""
    q, k, v = (tensor.transpose(1, 2) for tensor in inputs[:3])
    return fa4_ext.explain(q, k, v, is_causal=p.causal, enable_gqa=p.heads != p.heads_kv, **options)


def calls(p: Call, sets: list, enabled) -> dict:
    """Returns the forward and the backward as functions of a set's index, which run where the
    context `enabled` has them run. They take and return views of [batch, heads, seqlen, head_dim],
    as models make them. The results are given back in the layout of the inputs."""

    def attention(q, k, v):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=p.causal, enable_gqa=p.heads != p.heads_kv
        )

    views = [[tensor.transpose(1, 2) for tensor in tensors] for tensors in sets]

    @cache
    def recorded():
        # All at once, because a CUDA graph would otherwise capture forwards too.
        with enabled():
            return [_recorded(attention, *tensors[:3]) for tensors in views]

    def forward(i):
        with torch.no_grad():
            return (attention(*views[i][:3]).transpose(1, 2),)

    def backward(i):
        out, leaves = recorded()[i]
        gradients = torch.autograd.grad(out, leaves, views[i][3], retain_graph=True)
        return tuple(gradient.transpose(1, 2) for gradient in gradients)

    return {"forward": forward, "backward": backward}
