"""Defines the implementations that are measured: for each a differentiable function, and the
context in which it runs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa4_ext
from fa4_ext.bench.shapes import Shape


@dataclass(frozen=True)
class Contender:
    """An implementation of attention that can be measured. `dense(q, k, v, causal)` takes and
    returns [batch, heads, seqlen, head_dim]. `varlen(q, k, v, cu_seqlens, longest, causal)` takes
    and returns [tokens, heads, head_dim], and is None if there is no such function."""

    name: str
    label: str
    version: str
    dense: Callable[..., torch.Tensor]
    varlen: Callable[..., torch.Tensor] | None
    enabled: Callable[[], AbstractContextManager] = nullcontext
    has_backward: bool = True
    dtypes: tuple[str, ...] = ("bf16", "fp16")

    def has(self, shape: Shape, dtype: str, direction: str) -> bool:
        """Returns whether the contender can run this problem."""
        layout = self.varlen if shape.lengths else self.dense
        return (
            layout is not None
            and dtype in self.dtypes
            and (self.has_backward or direction == "forward")
        )


def _sdpa(q, k, v, causal):
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def _aten_varlen(q, k, v, cu_seqlens, longest, causal):
    """Calls the op behind torch.nn.attention.varlen, because the signature of varlen_attn differs
    between torch versions."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, causal, False
    )[0]


def _sequence_first(function):
    """Wraps a function of [batch, seqlen, heads, head_dim], which may return more than its output,
    as a `dense`."""

    def dense(q, k, v, causal):
        out = function(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return dense


def ours_enabled() -> AbstractContextManager:
    """Returns a context in which our kernels run or the call raises, so that no time of PyTorch's
    kernel, by a speed rule or otherwise, is reported as ours."""
    stack = ExitStack()
    stack.enter_context(fa4_ext.register(fallback="error", speed_rules=False))
    stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
    return stack


def _ours() -> Contender:
    return Contender("ours", "fa4_ext", fa4_ext.__version__, _sdpa, _aten_varlen, ours_enabled)


def _stock() -> Contender:
    enabled = functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
    return Contender(
        "stock", "PyTorch flash (FA2)", str(torch.__version__), _sdpa, _aten_varlen, enabled
    )


def cudnn_version() -> str | None:
    number = torch.backends.cudnn.version()
    return f"{number // 10000}.{number // 100 % 100}" if number else None


def _cudnn() -> Contender:
    name = cudnn_version()
    if name is None:
        raise ImportError("this build of torch has no cuDNN")
    return Contender(
        "cudnn", f"cuDNN {name}", name, _sdpa, None,
        functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
    )  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        # Its modules lie on the path, but it was not installed.
        return "unknown"


def _fa4() -> Contender:
    # The call returns the logsumexp too, as the aten ops do and as a training step needs. A call
    # without it does less.
    interface = import_module("flash_attn.cute.interface")
    dense = functools.partial(interface.flash_attn_func, return_lse=True)

    def varlen(q, k, v, cu_seqlens, longest, causal):
        lengths = {
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
        }
        return interface.flash_attn_varlen_func(q, k, v, **lengths, causal=causal, return_lse=True)[
            0
        ]

    return Contender(
        "fa4", "flash-attn-4 (JIT)", _version("flash-attn-4"), _sequence_first(dense), varlen
    )


def _fa3() -> Contender:
    """Wraps fa3-fwd, a build of FlashAttention-3 with the bf16 forward only."""
    module = import_module("fa3_fwd_interface")
    dense = _sequence_first(module.flash_attn_func)
    return Contender(
        "fa3",
        "FlashAttention-3",
        _version("fa3-fwd"),
        dense,
        None,
        has_backward=False,
        dtypes=("bf16",),
    )


KNOWN = {"ours": _ours, "stock": _stock, "cudnn": _cudnn, "fa4": _fa4, "fa3": _fa3}


def contenders(names: list[str] | None = None) -> list[Contender]:
    """Returns the named contenders. With None it returns all that are available, and prints a line
    on stderr for each of the others.

    Raises:
        ValueError: a name is not known, or a named contender is not available.
    """
    found = []
    for name in dict.fromkeys(names or KNOWN):
        if name not in KNOWN:
            raise ValueError(f"argument --contenders: {name!r} is none of {', '.join(KNOWN)}")
        try:
            found.append(KNOWN[name]())
        except Exception as error:
            # The package is not installed, or raises something else where it does not load.
            if names:
                raise ValueError(f"argument --contenders: {name} can't be had: {error}") from error
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found
