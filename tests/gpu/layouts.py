"""Lays tensors of the same values out in memory as users lay them out. A layout is a function from
a tensor to such a one."""

from __future__ import annotations

import torch

# The dimensions of [batch, seqlen, heads, head_dim].
BATCH, SEQLEN, HEADS, DIM = range(4)


def permuted(*order: int):
    """Returns a layout with the memory's dimensions in another order, the first one outermost."""

    def layout(t: torch.Tensor) -> torch.Tensor:
        inverse = [order.index(d) for d in range(len(order))]
        return t.permute(order).contiguous().permute(inverse)

    return layout


def cut_from(dim: int, before: int, after: int):
    """Returns a layout that is a slice of a larger tensor whose other elements are NaN, so that
    reading beyond the slice shows."""

    def layout(t: torch.Tensor) -> torch.Tensor:
        shape = list(t.shape)
        shape[dim] += before + after
        whole = torch.full(shape, float("nan"), dtype=t.dtype, device=t.device)
        part = whole.narrow(dim, before, t.shape[dim])
        part.copy_(t)
        return part

    return layout


def offset(elements: int):
    """Returns a layout of the same strides, in a storage that begins `elements` earlier."""

    def layout(t: torch.Tensor) -> torch.Tensor:
        whole = torch.full((t.numel() + elements,), float("nan"), dtype=t.dtype, device=t.device)
        part = whole[elements:].view(t.shape)
        part.copy_(t)
        return part

    return layout


def expanded(*dims: int):
    """Returns a layout of stride 0 along `dims`: one entry stands for all."""

    def layout(t: torch.Tensor) -> torch.Tensor:
        part = t
        for dim in dims:
            part = part.narrow(dim, 0, 1)
        return part.contiguous().expand(t.shape)

    return layout
