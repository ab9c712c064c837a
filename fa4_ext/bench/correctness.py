"""Makes the inputs of a problem, and checks a contender's outputs against attention in fp32."""

from __future__ import annotations

import torch

from fa4_ext.bench.masks import PADDED, Mask, rows_in_use, starts
from fa4_ext.bench.shapes import Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The limit is on the norm of the error over the norm of the truth. bf16 attention is at 2 to 6 in a
# thousand, fp16 at an eighth of it; a wrong mask or scale is at 1 in 10.
MAX_RELATIVE_ERROR = {"bf16": 1.5e-2, "fp16": 1.5e-2 / 8}
ROWS = 2048  # queries at a time: the scores of 32k keys take 256 MiB
# The comparison takes the first sequence with the first key/value head and the query heads that
# share it, and the last sequence with the last ones. One of them shows what is off by a row, a head
# or a sequence.
CORNERS = (0, -1)


def make_inputs(shape: Shape, dtype: str) -> list[torch.Tensor]:
    """Makes random q, k, v and dO. Dense tensors are [batch, heads, seqlen, head_dim] views of
    [batch, seqlen, heads, head_dim] memory, as in models; varlen tensors are [tokens, heads,
    head_dim]. dO of padding is 0."""
    sizes = [
        (shape.seqlen_q, shape.heads),
        (shape.seqlen_k, shape.heads_kv),
        (shape.seqlen_k, shape.heads_kv),
    ]
    sizes.append(sizes[0])
    options = {"dtype": DTYPES[dtype], "device": "cuda"}
    if shape.lengths:
        return [torch.randn(shape.total_q, heads, shape.head_dim, **options) for _, heads in sizes]
    inputs = [
        torch.randn(shape.batch, rows, heads, shape.head_dim, **options).transpose(1, 2)
        for rows, heads in sizes
    ]
    if shape.mask in PADDED:
        for of_sequence, rows in zip(inputs[3], rows_in_use(shape), strict=True):
            of_sequence[:, : rows.start] = 0
            of_sequence[:, rows.stop :] = 0
    return inputs


def make_cu_seqlens(shape: Shape) -> torch.Tensor | None:
    """Returns cu_seqlens, int32 [sequences + 1], of a varlen problem, or None for a dense one."""
    return starts(shape.lengths, "cuda") if shape.lengths else None


def corner_of(tensor: torch.Tensor, shape: Shape, corner: int) -> torch.Tensor:
    """Returns the corner of a tensor in the inputs' layout, as [heads, rows, head_dim]."""
    group = tensor.shape[1] // shape.heads_kv
    heads = tensor[:, :group] if corner == 0 else tensor[:, -group:]
    if not shape.lengths:
        return heads[corner]
    rows = shape.lengths[corner]
    return (heads[:rows] if corner == 0 else heads[-rows:]).transpose(0, 1)


def attention(q, k, v, do, causal: bool, bias=None) -> tuple[torch.Tensor, ...]:
    """Computes attention in fp32 in plain torch, and returns out, dq, dk and dv. q and do are
    [heads, rows, head_dim], k and v [1, rows, head_dim], bias is [heads, rows, keys]."""
    q, k, v, do = (t.float() for t in (q, k[0], v[0], do))
    scale = q.shape[-1] ** -0.5
    # The query row on whose diagonal each key lies.
    columns = torch.arange(k.shape[0], device=q.device) - (k.shape[0] - q.shape[1])
    out, dq, dk, dv = (
        torch.empty_like(q),
        torch.empty_like(q),
        torch.zeros_like(k),
        torch.zeros_like(v),
    )
    for head in range(q.shape[0]):
        for begin in range(0, q.shape[1], ROWS):
            rows = slice(begin, min(begin + ROWS, q.shape[1]))
            scores = q[head, rows] @ k.T * scale
            if causal:
                scores.masked_fill_(
                    columns[None] > torch.arange(rows.start, rows.stop, device=q.device)[:, None],
                    float("-inf"),
                )
            if bias is not None:
                scores += bias[head, rows]
            p = scores.softmax(-1)
            out[head, rows] = p @ v
            dp = do[head, rows] @ v.T
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            dq[head, rows] = ds @ k
            dk += ds.T @ q[head, rows]
            dv += p.T @ do[head, rows]
    return out, dq, dk[None], dv[None]


def truth(
    shape: Shape, inputs: list[torch.Tensor], mask: Mask | None = None
) -> list[tuple[torch.Tensor, ...]]:
    """Returns the fp32 out, dq, dk and dv of each corner in CORNERS."""
    if mask:
        sizes = (shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k)
        inputs = [*inputs, mask.bias.expand(sizes)]
    corners = [[corner_of(t, shape, corner) for t in inputs] for corner in CORNERS]
    return [attention(q, k, v, do, shape.causal, *bias) for q, k, v, do, *bias in corners]


def worst_error(
    shape: Shape, outputs: tuple[torch.Tensor, ...], truths: list[tuple[torch.Tensor, ...]]
) -> float:
    """Returns the largest relative error of the outputs over all corners, without padding; NaN if
    an output has a NaN there."""
    errors = []
    for corner, of_corner in zip(CORNERS, truths, strict=True):
        rows = rows_in_use(shape)[corner]
        for output, truth in zip(outputs, of_corner, strict=True):
            ours, theirs = (t[:, rows] for t in (corner_of(output, shape, corner), truth))
            errors.append((ours.float() - theirs).norm() / theirs.norm())
    # max() keeps a NaN.
    return torch.stack(errors).max().item()


def check(
    shape: Shape,
    dtype: str,
    outputs: tuple[torch.Tensor, ...],
    truths: list[tuple[torch.Tensor, ...]],
) -> float:
    """Returns the largest relative error.

    Raises:
        RuntimeError: the error is larger than rounding explains.
    """
    error = worst_error(shape, outputs, truths)
    if not error <= MAX_RELATIVE_ERROR[dtype]:
        raise RuntimeError(
            f"wrong: relative error {error:.2e} against fp32, at most "
            f"{MAX_RELATIVE_ERROR[dtype]:.1e} is allowed"
        )
    return error
