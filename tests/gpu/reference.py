"""Attention written out: in fp32, the truth; in the inputs' own dtype, the error that PyTorch's plain math makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import Inputs, Problem


@dataclass
class Result:
    """Outputs of a forward and of its backward, in the layout of `_flash_attention_forward`.

    lse: fp32 natural logarithm, [batch, heads, seqlen_q], or [heads, total_q] when varlen; -inf for a row that sees no key.
    """

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None


def hidden(seqlen_q: int, seqlen_k: int, bounds: tuple[int, int], device) -> torch.Tensor:
    """Bool [seqlen_q, seqlen_k]: what the mask hides. The last query is aligned with the last key (bottom-right)."""
    diagonal = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=device)[None, :]
    left, right = bounds
    mask = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask |= key < diagonal - left
    if right >= 0:
        mask |= key > diagonal + right
    return mask


def attention(q, k, v, softmax_scale: float, bounds: tuple[int, int]):
    """Math attention in the dtype of its inputs, [..., seqlen, heads, head_dim] -> out of q's shape, lse [..., heads, seqlen_q]."""
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    group = q.shape[-3] // k.shape[-3]
    k, v = (t.repeat_interleave(group, dim=-3) for t in (k, v))
    mask = hidden(q.shape[-2], k.shape[-2], bounds, q.device)
    scores = (q @ (k * softmax_scale).transpose(-1, -2)).masked_fill(mask, float("-inf"))
    # A row without keys has softmax 0/0; its output and gradients are 0.
    probabilities = scores.softmax(dim=-1).masked_fill(mask.all(dim=-1, keepdim=True), 0.0)
    return (probabilities @ v).transpose(-3, -2), scores.float().logsumexp(dim=-1)


def compute(problem: Problem, inputs: Inputs, dtype: torch.dtype, *, backward: bool) -> Result:
    """Forward and, if asked, backward of the whole problem with math in `dtype`."""
    q, k, v = (t.detach().to(dtype).requires_grad_(backward) for t in (inputs.q, inputs.k, inputs.v))
    if problem.varlen:
        sequences = zip(q.split(problem.seqlens_q), k.split(problem.seqlens_k), v.split(problem.seqlens_k), strict=True)
        outs, lses = zip(*(attention(*s, problem.softmax_scale, problem.bounds) for s in sequences), strict=True)
        out, lse = torch.cat(outs), torch.cat(lses, dim=-1)
    else:
        out, lse = attention(q, k, v, problem.softmax_scale, problem.bounds)
    result = Result(out.detach(), lse.detach())
    if backward:
        result.dq, result.dk, result.dv = torch.autograd.grad(out, (q, k, v), inputs.do.to(dtype))
    return result
