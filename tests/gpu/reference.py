"""Writes attention out: in fp32, which gives the truth, and in the inputs' own dtype, which gives
the error that PyTorch's plain math makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import Inputs, Problem

# A row with a logsumexp farther from zero has no gradients: in fp32 it does not tell its keys'
# weights.
FARTHEST_LSE_WITH_GRADIENTS = 2.0**20


@dataclass
class Result:
    """The outputs of a forward and of its backward, in the layout of `_flash_attention_forward`.

    lse: fp32 natural logarithm, [batch, heads, seqlen_q], or [heads, total_q] when varlen; -inf for
    a row that sees no key. With a bias, a row may see keys and have no gradients.
    """

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None


def hidden(
    seqlens_q, seqlens_k, bounds: tuple[int, int], device, top_left: bool = False
) -> torch.Tensor:
    """Returns a bool [batch, 1, longest q, longest k] tensor of what the mask hides or is beyond a
    sequence's end. The last query and the last key of a sequence are aligned (bottom-right), or
    with `top_left` the first ones."""
    rows, keys = (
        torch.tensor(seqlens, device=device)[:, None, None, None]
        for seqlens in (seqlens_q, seqlens_k)
    )
    row = torch.arange(max(seqlens_q), device=device)[:, None]
    key = torch.arange(max(seqlens_k), device=device)[None, :]
    diagonal = row + (0 if top_left else keys - rows)
    left, right = bounds
    mask = (row >= rows) | (key >= keys)
    if left >= 0:
        mask |= key < diagonal - left
    if right >= 0:
        mask |= key > diagonal + right
    return mask


def attention(q, k, v, softmax_scale: float, mask: torch.Tensor, bias: torch.Tensor | None = None):
    """Computes math attention in the dtype of its inputs, [batch, seqlen, heads, head_dim], and
    returns out and lse, [batch, heads, seqlen_q]. What a bias of minus infinity hides need not be
    in the mask."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = q @ (k * softmax_scale).transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
        mask = mask | bias.isneginf()
    scores = scores.masked_fill(mask, float("-inf"))
    # A row without keys has softmax 0/0. Its output and gradients are 0.
    probabilities = scores.softmax(dim=-1).masked_fill(mask.all(dim=-1, keepdim=True), 0.0)
    out, lse = probabilities @ v, scores.float().logsumexp(dim=-1)
    if bias is not None:
        out = torch.where((lse.abs() > FARTHEST_LSE_WITH_GRADIENTS)[..., None], out.detach(), out)
    return out.transpose(1, 2), lse


class Padding:
    """Converts between [total, heads, head_dim], sequences back to back, and [batch, longest,
    heads, head_dim]. Gradients pass through."""

    def __init__(self, seqlens, device):
        self.shape = len(seqlens), max(seqlens)
        rows = [
            torch.arange(length) + index * self.shape[1] for index, length in enumerate(seqlens)
        ]
        self.rows = torch.cat(rows).to(device)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        batch, longest = self.shape
        empty = packed.new_zeros(batch * longest, *packed.shape[1:])
        return empty.index_copy(0, self.rows, packed).view(batch, longest, *packed.shape[1:])

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        return padded.flatten(0, 1).index_select(0, self.rows)


def compute(problem: Problem, inputs: Inputs, dtype: torch.dtype, *, backward: bool) -> Result:
    """Runs the forward and, if asked, the backward of the whole problem with math in `dtype`."""
    q, k, v = (
        t.detach().to(dtype).requires_grad_(backward) for t in (inputs.q, inputs.k, inputs.v)
    )
    device = q.device
    if problem.varlen:
        queries, keys = Padding(problem.seqlens_q, device), Padding(problem.seqlens_k, device)
        mask = hidden(problem.seqlens_q, problem.seqlens_k, problem.bounds, device)
        out, lse = attention(queries.pad(q), keys.pad(k), keys.pad(v), problem.softmax_scale, mask)
        out, lse = queries.pack(out), queries.pack(lse.transpose(1, 2)).t()
    else:
        one = problem.seqlens_q[:1], problem.seqlens_k[:1]
        mask = hidden(*one, problem.bounds, device, problem.top_left)
        bias = None if inputs.bias is None else inputs.bias.to(dtype)
        out, lse = attention(q, k, v, problem.softmax_scale, mask, bias)
    result = Result(out.detach(), lse.detach())
    if backward:
        result.dq, result.dk, result.dv = torch.autograd.grad(out, (q, k, v), inputs.do.to(dtype))
    return result
