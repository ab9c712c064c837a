"""This module computes the gradients of attention where one of its logsumexp is given, too.

The op's backward takes a gradient of the output alone. It computes the scores' gradient dS =
P * (dO V^T - delta), with delta = rowsum(dO * O). A gradient dlse of the logsumexp adds P * dlse,
which is as if dlse were subtracted from delta. So the backward gets more columns, where O holds
-dlse, dO is one and V is zero: they leave dO V^T as it is, and add up to -dlse in delta.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ._native import ops

COLUMNS = 8  # head dims are multiples of it
LARGEST_HEAD_DIM = 256
# The columns that hold parts of dlse: as many of bf16 have all bits of fp32.
PARTS = 3


def gradients(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    *options,
) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of q, k and v. All arguments but grad_lse are those of the op's
    backward.

    Raises:
        NotImplementedError: grad_lse is given, and a head dim is above 248.
    """
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    if grad_lse is None:
        return ops.attention_backward(grad_out, q, k, v, out, lse, *lengths, scale, *options)
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    if max(head_dim, head_dim_v) + COLUMNS > LARGEST_HEAD_DIM:
        raise NotImplementedError(
            "the logsumexp has a gradient for head dims of at most "
            f"{LARGEST_HEAD_DIM - COLUMNS}, here {head_dim} and {head_dim_v}: detach it where its "
            "gradient is not wanted, also where a compiled function returns it"
        )
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    scale = head_dim**-0.5 if scale is None else scale
    if head_dim == head_dim_v:  # PyTorch's flash attention, which may run it, wants them equal
        q, k = (functional.pad(tensor, (0, COLUMNS)) for tensor in (q, k))
    found = ops.attention_backward(
        functional.pad(grad_out, (0, COLUMNS), value=1.0), q, k, functional.pad(v, (0, COLUMNS)),
        torch.cat((out, _columns(grad_lse, lse, out)), -1), lse, *lengths, scale, *options,
    )  # fmt: skip
    sizes = head_dim, head_dim, head_dim_v
    return tuple(one[..., :size] for one, size in zip(found, sizes, strict=True))


def _columns(grad_lse: torch.Tensor, lse: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Returns the columns behind those of `out`, which add up to -grad_lse, or to zero where a row
    has no keys: there the logsumexp is a constant."""
    rest = -grad_lse.where(lse.isfinite(), 0.0).transpose(-1, -2)
    parts = []
    for _ in range(PARTS):
        parts.append(rest.to(out.dtype))
        rest = rest - parts[-1].to(rest.dtype)
    return functional.pad(torch.stack(parts, -1), (0, COLUMNS - PARTS))
