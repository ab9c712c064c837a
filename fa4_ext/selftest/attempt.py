"""Runs one kernel in this process, on all its problems, and compares its results with fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import fa4_ext
from fa4_ext import _library
from fa4_ext.selftest.compare import what_is_wrong
from fa4_ext.selftest.problems import Kernel, Problem, others, problems_for
from fa4_ext.selftest.reference import (
    DTYPES,
    GRADIENTS,
    Inputs,
    compute,
    in_pages,
    make_inputs,
)

RIGHT, WRONG, NOT_LOADED, FAILED, NOT_RUN = "right", "wrong", "not loadable", "failed", "not run"

# csrc/core/launch/module.cpp begins so where the driver refuses a kernel.
_LOADING = "loading kernel"


@dataclass(frozen=True)
class Where:
    """What the problems run on.

    Attributes:
        device: of their tensors.
        ops: what has the attention ops, torch.ops.aten on a GPU.
        own: what has this library's own ones, torch.ops.fa4_ext on a GPU.
        capability, sm_count: what to plan for, such as 90 and 132; 0 stands for the device's own.
    """

    device: str
    ops: Any = torch.ops.aten
    own: Any = torch.ops.fa4_ext
    capability: int = 0
    sm_count: int = 0


def attempt(kernel: Kernel, kernels: Sequence[Kernel], where: Where) -> tuple[str, str]:
    """Returns RIGHT, WRONG, NOT_LOADED, FAILED or NOT_RUN, and a sentence about the problem in
    which that was found, or "".

    FAILED: a call raised an error, after which the device may be unusable. NOT_RUN: the planner has
    no problem for this kernel, so that nothing is known about it.
    """
    with alone(kernel, kernels):
        for problem in problems_for(kernel):
            torch.manual_seed(0)
            try:
                inputs = make_inputs(problem, where.device)
                if reason := why_not_run(kernel, problem, inputs, where):
                    return NOT_RUN, f"{problem}: {reason}"
                wrong = _run_and_compare(problem, inputs, where)
            except RuntimeError as error:
                text = str(error).strip().partition("\n")[0]
                return (NOT_LOADED if _LOADING in text else FAILED), f"{problem}: {text}"
            if wrong:
                return WRONG, f"{problem}: {wrong}"
    return RIGHT, ""


@contextmanager
def alone(kernel: Kernel, kernels: Sequence[Kernel]) -> Iterator[None]:
    """Leaves out what could run in the kernel's place. A call that no kernel runs is an error,
    except where PyTorch's own backward is to run by a speed rule."""
    by_stock = kernel["op"] == "clear"
    with fa4_ext.register(
        fallback="stock" if by_stock else "error", speed_rules=by_stock, disable=()
    ):
        _library.disable(others(kernel, kernels))
        try:
            yield
        finally:
            _library.disable(())


def why_not_run(kernel: Kernel, problem: Problem, inputs: Inputs, where: Where) -> str | None:
    """Returns what the planner says instead of this kernel's name, or None. For a problem that a
    speed rule leaves to PyTorch it must say so."""
    k, v, cu_seqlens_k = inputs.k, inputs.v, inputs.cu_seqlens_k
    table = used = None
    if problem.page_size:
        k, v, table, used = in_pages(problem, inputs)
        cu_seqlens_k = None
    supported, planned, reason = torch.ops.fa4_ext.explain(
        inputs.q, k, v, inputs.cu_seqlens_q, cu_seqlens_k,
        max(problem.seqlens_q), max(problem.seqlens_k), 0.0, problem.is_causal, False, None,
        *problem.window, used, None, table, None, deterministic=problem.deterministic,
        backward=problem.backward, speed_rules=problem.by_stock,
        capability=where.capability, sm_count=where.sm_count,
        peer="flash" if inputs.bias is None else "cudnn", own=table is not None,
        attn_mask=inputs.bias,
    )[:3]  # fmt: skip
    if problem.by_stock:
        if not supported and "the stock kernel is faster" in reason:
            return None
    elif planned == kernel["name"]:
        return None
    return f"the planner takes {planned}" if supported else f"the planner says that {reason}"


def _run_and_compare(problem: Problem, inputs: Inputs, where: Where) -> str | None:
    truth = compute(problem, inputs, torch.float32)
    plain = compute(problem, inputs, DTYPES[problem.dtype])
    if not problem.backward:
        return what_is_wrong(_forward(problem, inputs, where), plain, truth)
    gradients = _backward(problem, inputs, truth, where.ops)
    if wrong := what_is_wrong(gradients, plain, truth):
        return wrong
    if problem.deterministic:
        again = _backward(problem, inputs, truth, where.ops)
        for name, first in gradients.items():
            if not torch.equal(first, again[name]):
                return f"{name}: a second run, which must be deterministic, has other bits"
    return None


def _forward(problem: Problem, x: Inputs, where: Where) -> dict[str, torch.Tensor]:
    poison(x)
    if x.bias is not None:
        out, lse = where.ops._scaled_dot_product_cudnn_attention(
            *_heads_first(x.q, x.k, x.v), x.bias, True, 0.0, False, False
        )[:2]
        return {"out": out.transpose(1, 2), "lse": lse.squeeze(-1)}
    longest = max(problem.seqlens_q), max(problem.seqlens_k)
    if problem.page_size:
        k, v, table, used = in_pages(problem, x)
        out, lse = where.own.attention(
            x.q, k, v, x.cu_seqlens_q, None, *longest, used, table, None, problem.is_causal,
            *problem.window, 0, False,
        )  # fmt: skip
    else:
        out, lse = where.ops._flash_attention_forward(
            x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, *longest, 0.0, problem.is_causal, False,
            **_window(problem),
        )[:2]  # fmt: skip
    rows = sum(problem.seqlens_q)
    if problem.rows_behind:  # where a forward writes nothing
        out, lse = out[:rows], lse[:, :rows]
    return {"out": out, "lse": lse}


def _backward(
    problem: Problem, x: Inputs, truth: dict[str, torch.Tensor], ops
) -> dict[str, torch.Tensor]:
    """Runs the backward on the results of fp32 math, so that no forward kernel takes part."""
    out, lse = truth["out"].to(x.q.dtype), truth["lse"]
    if problem.rows_behind:
        out = torch.cat([out, x.do[len(out) :]])
        lse = torch.cat([lse, lse.new_zeros(len(lse), problem.rows_behind)], dim=1)
    poison(x)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(problem.deterministic)
    run = _flash_backward if x.bias is None else _cudnn_backward
    try:
        gradients = run(problem, x, out, lse.contiguous(), ops)
    finally:
        torch.use_deterministic_algorithms(before)
    return dict(zip(GRADIENTS, gradients, strict=True))


def _flash_backward(problem: Problem, x: Inputs, out, lse, ops) -> tuple[torch.Tensor, ...]:
    random = torch.zeros(2, dtype=torch.uint64, device=out.device)  # of dropout: nobody reads it
    return ops._flash_attention_backward(
        x.do, x.q, x.k, x.v, out, lse, x.cu_seqlens_q, x.cu_seqlens_k, max(problem.seqlens_q),
        max(problem.seqlens_k), 0.0, problem.is_causal, random, random[0], **_window(problem),
    )  # fmt: skip


def _cudnn_backward(problem: Problem, x: Inputs, out, lse, ops) -> tuple[torch.Tensor, ...]:
    # csrc/aten/cudnn_ops.cpp: by the place of its seed it says that a forward of ours ran.
    random = torch.zeros(3, dtype=torch.int64, device=out.device)
    gradients = ops._scaled_dot_product_cudnn_attention_backward(
        *_heads_first(x.do, x.q, x.k, x.v, out), lse[..., None], random[2], random[0], x.bias,
        None, None, max(problem.seqlens_q), max(problem.seqlens_k), 0.0, False,
    )  # fmt: skip
    return _heads_first(*gradients)


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Swaps heads and rows."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _window(problem: Problem) -> dict[str, int | None]:
    left, right = (None if bound < 0 else bound for bound in problem.window)
    return {"window_size_left": left, "window_size_right": right}


def poison(inputs: Inputs) -> None:
    """Fills free blocks of torch's allocator, of the sizes that the call asks for, with 0xFF: a NaN
    in every float dtype. So an element that no kernel writes is found."""
    tensors = [tensor for tensor in vars(inputs).values() if tensor is not None]
    rows = inputs.q.nbytes // inputs.q.shape[-1]  # of lse
    sizes = {factor * tensor.nbytes for tensor in tensors for factor in (1, 2, 4)}
    blocks = [
        torch.full((size,), 255, dtype=torch.uint8, device=inputs.q.device)
        for size in sorted(sizes | {512, rows, 2 * rows} - {0})
        for _ in range(3)
    ]
    del blocks
