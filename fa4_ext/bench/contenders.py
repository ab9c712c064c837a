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
from fa4_ext.bench import masks
from fa4_ext.bench.grids import CONTENDERS
from fa4_ext.bench.shapes import Shape


@dataclass(frozen=True)
class Contender:
    """An implementation of attention that can be measured. `dense(q, k, v, causal)` takes and
    returns [batch, heads, seqlen, head_dim], and so does `masked(q, k, v, mask)`, whose mask is a
    masks.Mask. `varlen(q, k, v, cu_seqlens, longest, causal)` takes and returns [tokens, heads,
    head_dim]. They are None if there is no such function."""

    name: str
    label: str
    version: str
    dense: Callable[..., torch.Tensor] | None
    varlen: Callable[..., torch.Tensor] | None
    enabled: Callable[[], AbstractContextManager] = nullcontext
    has_backward: bool = True
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    masked: Callable[..., torch.Tensor] | None = None
    masks: tuple[str, ...] = masks.KINDS  # that it can run, if there is `masked`
    grouped: bool = True  # whether query heads may share a head of keys and values

    def function(self, shape: Shape) -> Callable[..., torch.Tensor] | None:
        """Returns the one of its functions that such a problem is for."""
        return self.masked if shape.mask else self.varlen if shape.lengths else self.dense

    def has(self, shape: Shape, dtype: str, direction: str) -> bool:
        """Returns whether the contender can run this problem."""
        return (
            self.function(shape) is not None
            and (not shape.mask or shape.mask in self.masks)
            and (self.grouped or shape.heads == shape.heads_kv)
            and dtype in self.dtypes
            and (self.has_backward or direction == "forward")
        )


def _sdpa(q, k, v, causal):
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def _masked(q, k, v, mask):
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.bias, enable_gqa=q.shape[1] != k.shape[1]
    )


def _masked_by_ours(q, k, v, mask):
    # torch takes a mask to cuDNN's op, whose override needs that flash attention is enabled, too.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        return _masked(q, k, v, mask)


def _aten_varlen(q, k, v, cu_seqlens, longest, causal):
    """Calls the op behind torch.nn.attention.varlen, because the signature of varlen_attn differs
    between torch versions."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, causal, False
    )[0]


def _unmasked(q, k, v, mask):
    """Calls for the same as a causal mask, a window, or packed sequences."""
    if mask.kind == masks.CAUSAL:
        return _sdpa(q, k, v, True)
    qkv = [t.transpose(1, 2) for t in (q, k, v)]
    if mask.kind == masks.WINDOW:
        return torch.ops.aten._flash_attention_forward(
            *qkv, None, None, q.shape[2], k.shape[2], 0.0, True, False,
            window_size_left=masks.WINDOW_SIZE - 1, window_size_right=0,
        )[0].transpose(1, 2)  # fmt: skip
    packed = (t.flatten(0, 1) for t in qkv)
    out = _aten_varlen(*packed, mask.cu_seqlens, mask.longest, mask.kind != masks.RIGHT)
    return out.unflatten(0, qkv[0].shape[:2]).transpose(1, 2)


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
    return Contender(
        "ours", "fa4_ext", fa4_ext.__version__, _sdpa, _aten_varlen, ours_enabled,
        masked=_masked_by_ours,
    )  # fmt: skip


def _ours_unmasked() -> Contender:
    return Contender(
        "unmasked", "fa4_ext without a mask", fa4_ext.__version__, None, None, ours_enabled,
        masked=_unmasked, masks=(*masks.PADDED, masks.CAUSAL, masks.WINDOW, masks.DOCUMENTS),
    )  # fmt: skip


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
        functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION), masked=_masked,
    )  # fmt: skip


def _efficient() -> Contender:
    return Contender(
        "efficient", "PyTorch memory-efficient", str(torch.__version__), _sdpa, None,
        functools.partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION), masked=_masked,
        grouped=False,
    )  # fmt: skip


def _flex() -> Contender:
    from torch.nn.attention import flex_attention

    # A kernel is compiled for each mask. The backward keeps what it reads, because it is timed
    # without its forward.
    @functools.lru_cache(maxsize=1)
    def compiled(mask, batch, seqlen):
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False
        attention = torch.compile(flex_attention.flex_attention, dynamic=False)
        if mask.kind == masks.SLOPES:
            return functools.partial(
                attention, score_mod=lambda score, b, h, row, key: score + mask.bias[0, h, row, key]
            )
        first, end = (t.expand(batch, seqlen).contiguous() for t in (mask.first, mask.end))
        blocks = flex_attention.create_block_mask(
            lambda b, h, row, key: (key >= first[b, row]) & (key < end[b, row]),
            batch, None, seqlen, seqlen, device=first.device.type,
        )  # fmt: skip
        return functools.partial(attention, block_mask=blocks)

    def masked(q, k, v, mask):
        attention = compiled(mask, q.shape[0], q.shape[2])
        return attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    return Contender("flex", "flex_attention", str(torch.__version__), None, None, masked=masked)


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


KNOWN = {
    "ours": _ours, "stock": _stock, "cudnn": _cudnn, "fa4": _fa4, "fa3": _fa3,
    "efficient": _efficient, "unmasked": _ours_unmasked, "flex": _flex,
}  # fmt: skip


def contenders(
    names: list[str] | None = None, default: tuple[str, ...] = CONTENDERS
) -> list[Contender]:
    """Returns the named contenders. With None it returns those of `default` that are available, and
    prints a line on stderr for each of the others.

    Raises:
        ValueError: a name is not known, or a named contender is not available.
    """
    found = []
    for name in dict.fromkeys(names or default):
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
