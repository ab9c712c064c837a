"""Makes the tensors of a problem, and writes attention out in plain torch: in fp32, which gives the
truth, and in the inputs' dtype, which gives the error that PyTorch's math makes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from fa4_ext.selftest.problems import Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GRADIENTS = ("dq", "dk", "dv")

# A finite bias that hides a key beside any other one: PyTorch's fill for bool masks, where it is
# not minus infinity. Of a bias of slopes it hides what lies beyond the window.
_FILL = -65504.0
_WINDOW = 100
_HOLES = 1 / 16  # of the keys that a causal bias leaves


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call, [batch, seqlen, heads, head_dim], or [total, heads, head_dim] with
    varlen. `do` is the gradient of the output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None  # int32 [batch + 1]
    cu_seqlens_k: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def make_inputs(problem: Problem, device) -> Inputs:
    """Makes random tensors. Rows behind the last sequence hold NaN, which no result may depend on;
    where PyTorch's own backward runs they are random."""

    def normal(seqlens: tuple[int, ...], heads: int, head_dim: int) -> torch.Tensor:
        rows = (
            (sum(seqlens) + problem.rows_behind,) if problem.varlen else (len(seqlens), seqlens[0])
        )
        tensor = torch.randn(*rows, heads, head_dim, dtype=DTYPES[problem.dtype], device=device)
        if problem.rows_behind and not problem.by_stock:
            tensor[sum(seqlens) :] = float("nan")
        return tensor

    def starts(seqlens: tuple[int, ...]) -> torch.Tensor | None:
        if not problem.varlen:
            return None
        return torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, device=device)

    return Inputs(
        normal(problem.seqlens_q, problem.heads, problem.head_dim),
        normal(problem.seqlens_k, problem.heads_kv, problem.head_dim),
        normal(problem.seqlens_k, problem.heads_kv, problem.head_dim_v),
        normal(problem.seqlens_q, problem.heads, problem.head_dim_v),
        starts(problem.seqlens_q),
        starts(problem.seqlens_k),
        _make_bias(problem, device) if problem.bias else None,
    )


def in_pages(
    problem: Problem, inputs: Inputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns keys and values in pages, the block table and the lengths. The pages are in reverse
    order. Rows behind a sequence hold NaN, and so does a page of its own that no sequence has."""
    size = problem.page_size
    counts = [-(-length // size) for length in problem.seqlens_k]
    table = torch.full((len(counts), max(counts) + 1), -1, dtype=torch.int32)
    caches = [
        packed.new_full((sum(counts) + 1, size, *packed.shape[1:]), float("nan"))
        for packed in (inputs.k, inputs.v)
    ]
    last, begin = sum(counts) - 1, 0
    for sequence, length in enumerate(problem.seqlens_k):
        for page, first in enumerate(range(0, length, size)):
            rows = min(size, length - first)
            for cache, packed in zip(caches, (inputs.k, inputs.v), strict=True):
                cache[last, :rows] = packed[begin : begin + rows]
            table[sequence, page] = last
            last, begin = last - 1, begin + rows
    lengths = torch.tensor(problem.seqlens_k, dtype=torch.int32)
    device = inputs.q.device
    return *caches, table.to(device), lengths.to(device)


def _make_bias(problem: Problem, device) -> torch.Tensor:
    options = {"dtype": DTYPES[problem.dtype], "device": device}
    if problem.bias == "random":
        return torch.randn(problem.bias_shape, **options)
    bias = torch.zeros(problem.bias_shape, **options)
    rows, keys = problem.seqlens_q[0], problem.seqlens_k[0]
    # of the query whose diagonal a key lies on, bottom-right
    distance = torch.arange(rows, device=device)[:, None] + keys - rows
    distance = distance - torch.arange(keys, device=device)
    if problem.bias == "padding":  # all sequences but the first keep a third of their keys
        bias[1:, ..., keys // 3 :] = float("-inf")
    elif problem.bias == "causal":
        bias[(distance < 0) | (torch.rand(rows, keys, device=device) < _HOLES)] = float("-inf")
    else:
        slopes = 0.5 ** torch.arange(1, 1 + problem.heads, device=device)
        bias -= (slopes[:, None, None] * distance.abs()).to(bias.dtype)
        bias[..., distance.abs() > _WINDOW] = _FILL
        bias[..., -1, :] = _FILL
    return bias


def compute(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns out and lse of the problem by math in `dtype`, and of a backward also dq, dk and dv.
    lse is fp32, [batch, heads, seqlen_q], or [heads, total_q] with varlen, and -inf for a row that
    sees no key. Results of rows behind the last sequence are 0."""
    total_q, total_k = sum(problem.seqlens_q), sum(problem.seqlens_k)
    q, k, v, do = (tensor.detach().to(dtype) for tensor in _own_rows(problem, inputs))
    for tensor in (q, k, v):
        tensor.requires_grad_(problem.backward)
    if problem.varlen:
        queries, keys = (
            _Padding(seqlens, q.device) for seqlens in (problem.seqlens_q, problem.seqlens_k)
        )
        out, lse = _attention(problem, queries.pad(q), keys.pad(k), keys.pad(v), None)
        out, lse = queries.pack(out), queries.pack(lse.transpose(1, 2)).t()
    else:
        out, lse = _attention(problem, q, k, v, inputs.bias)
    results = {"out": out.detach(), "lse": lse.detach()}
    if problem.backward:
        gradients = torch.autograd.grad(out, (q, k, v), do)
        totals = (total_q, total_k, total_k)
        for name, gradient, total in zip(GRADIENTS, gradients, totals, strict=True):
            results[name] = _with_rows_behind(problem, gradient, total)
    return results


def _own_rows(problem: Problem, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    tensors = inputs.q, inputs.k, inputs.v, inputs.do
    if not problem.varlen:
        return tensors
    return tuple(
        tensor[: sum(seqlens)]
        for tensor, seqlens in zip(
            tensors,
            (problem.seqlens_q, problem.seqlens_k, problem.seqlens_k, problem.seqlens_q),
            strict=True,
        )
    )


def _with_rows_behind(problem: Problem, gradient: torch.Tensor, total: int) -> torch.Tensor:
    if not problem.rows_behind:
        return gradient
    whole = gradient.new_zeros(total + problem.rows_behind, *gradient.shape[1:])
    whole[:total] = gradient
    return whole


def _attention(problem: Problem, q, k, v, bias) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes [batch, seqlen, heads, head_dim], and returns out and lse, [batch, heads, seqlen]."""
    mask = _hidden(problem, q.device)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    group = problem.heads // problem.heads_kv
    k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
    scores = q @ (k * problem.head_dim**-0.5).transpose(-1, -2)
    if bias is not None:
        mask = mask | bias.isneginf()
        # It is added in fp32: beside _FILL the scores would be lost in 16 bits.
        scores = scores.float() + bias.float().masked_fill(bias.isneginf(), 0.0)
    scores = scores.masked_fill(mask, float("-inf"))
    # A row without keys has softmax 0/0. Its output and gradients are 0.
    shares = scores.softmax(dim=-1).masked_fill(mask.all(dim=-1, keepdim=True), 0.0).to(v.dtype)
    return (shares @ v).transpose(1, 2), scores.float().logsumexp(dim=-1)


def _hidden(problem: Problem, device) -> torch.Tensor:
    """Returns a bool [batch, 1, longest q, longest k] tensor of what the mask hides or lies beyond
    a sequence's end."""
    rows, keys = (
        torch.tensor(seqlens, device=device)[:, None, None, None]
        for seqlens in (problem.seqlens_q, problem.seqlens_k)
    )
    row = torch.arange(max(problem.seqlens_q), device=device)[:, None]
    key = torch.arange(max(problem.seqlens_k), device=device)[None, :]
    diagonal = row + keys - rows
    left, right = problem.bounds
    mask = (row >= rows) | (key >= keys)
    if left >= 0:
        mask |= key < diagonal - left
    if right >= 0:
        mask |= key > diagonal + right
    return mask


class _Padding:
    """Converts between sequences back to back, [total, ...], and [batch, longest, ...]. Gradients
    pass through."""

    def __init__(self, seqlens: tuple[int, ...], device):
        self.shape = len(seqlens), max(seqlens)
        self.rows = torch.cat(
            [torch.arange(length) + index * self.shape[1] for index, length in enumerate(seqlens)]
        ).to(device)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        batch, longest = self.shape
        empty = packed.new_zeros(batch * longest, *packed.shape[1:])
        return empty.index_copy(0, self.rows, packed).view(batch, longest, *packed.shape[1:])

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        return padded.flatten(0, 1).index_select(0, self.rows)
