"""Who is measured: one differentiable `attention(q, k, v, causal)` each, and what has to be switched on around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa4_ext


@dataclass(frozen=True)
class Contender:
    """`attention` takes and returns [batch, heads, seqlen, head_dim]."""

    name: str
    label: str
    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
    enabled: Callable[[], AbstractContextManager] = nullcontext
    has_backward: bool = True


def _sdpa(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def ours_enabled() -> AbstractContextManager:
    """Our kernels or an error: a number that is stock's, by a speed rule or otherwise, must not stand under our name."""
    stack = ExitStack()
    stack.enter_context(fa4_ext.register(fallback="error", speed_rules=False))
    stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
    return stack


def _sequence_first(function):
    """A contender that takes [batch, seqlen, heads, head_dim], and may return more than its output."""

    def attention(q, k, v, causal):
        out = function(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attention


def contenders() -> list[Contender]:
    """Ours, PyTorch's own flash and cuDNN kernels, and the packages that happen to be installed."""
    cudnn = torch.backends.cudnn.version() or 0
    found = [
        Contender("ours", "fa4_ext", _sdpa, ours_enabled),
        Contender("stock", "PyTorch flash (FA2)", _sdpa, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
        Contender("cudnn", f"cuDNN {cudnn // 10000}.{cudnn // 100 % 100}", _sdpa, lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
    ]
    try:
        from flash_attn.cute.interface import flash_attn_func as fa4
    except ImportError:
        pass
    else:
        # With the logsumexp, which the aten ops return and a training step needs: without it a call does less.
        found.append(Contender("fa4", "flash-attn-4 (JIT)", _sequence_first(functools.partial(fa4, return_lse=True))))
    try:
        from fa3_fwd_interface import flash_attn_func as fa3
    except ImportError:
        pass
    else:
        found.append(Contender("fa3", "FlashAttention-3", _sequence_first(fa3), has_backward=False))
    return found
