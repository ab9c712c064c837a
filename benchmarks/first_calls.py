"""Defines the first call of each contender, for startup.py's processes. This module imports no
package at the top, because the contender's import is timed."""

from __future__ import annotations


def _sdpa(backend: str):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def ours():
    import fa4_ext  # noqa: F401  registers

    return _sdpa("FLASH_ATTENTION")


def stock():
    return _sdpa("FLASH_ATTENTION")


def cudnn():
    return _sdpa("CUDNN_ATTENTION")


def fa4():
    from flash_attn.cute.interface import flash_attn_func

    def call(q, k, v):
        out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call
