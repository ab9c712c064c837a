"""Packed sequences in a buffer that has other rows too, and what must become of these."""

from __future__ import annotations

import torch
from cases import Inputs
from reference import Result

NAN = float("nan")


def amid(x: Inputs, before: int, after: int, filler: float = NAN) -> Inputs:
    """Returns the same sequences with rows of `filler` before the first one and behind the last
    one."""
    tensors = {
        name: torch.cat(
            [t.new_full((rows, *t.shape[1:]), filler) if rows else t for rows in (before, 0, after)]
        )
        for name in ("q", "k", "v", "do")
        if (t := getattr(x, name)) is not None
    }
    return Inputs(
        **tensors, cu_seqlens_q=x.cu_seqlens_q + before, cu_seqlens_k=x.cu_seqlens_k + before
    )


def cut(result: Result, before: int, queries: int, keys: int) -> Result:
    """Returns the rows of sequences alone, which come behind the first `before`."""
    queries, keys = slice(before, before + queries), slice(before, before + keys)
    forward = result.out[queries], result.lse[:, queries]
    return (
        Result(*forward)
        if result.dq is None
        else Result(*forward, result.dq[queries], result.dk[keys], result.dv[keys])
    )


def assert_zero_outside(result: Result, before: int, queries: int, keys: int) -> None:
    """Asserts that the gradients of the rows that belong to no sequence are zero."""
    for name, count in (("dq", queries), ("dk", keys), ("dv", keys)):
        for where, rows in (("before", slice(before)), ("behind", slice(before + count, None))):
            wrong = (getattr(result, name)[rows] != 0).sum().item()
            assert not wrong, f"{name}: {wrong} elements {where} the sequences are not 0"
