"""Describes a random call as data. Its repr is the Python that makes it again."""

from __future__ import annotations

from dataclasses import dataclass

import biases
import torch
from cases import BLACKWELL, Problem

from fuzz.faults import FAULTS

OPS = {
    "flash": "_flash_attention_forward, _flash_attention_backward",
    "inplace": "_flash_attention_forward_no_dropout_inplace",
    "sdpa": "_scaled_dot_product_flash_attention and autograd",
    "functional": "F.scaled_dot_product_attention and autograd",
}


# TMA cannot address these layouts, and PyTorch's kernel reads 16 bytes at a time wherever they are,
# which is an error of the device.
UNALIGNED = {"offset_8_bytes", "offset_2_bytes", "row_stride_odd", "row_stride_8_bytes"}


@dataclass(frozen=True)
class Case:
    """One call, and the backward after it."""

    # The op is one of OPS.
    op: str
    problem: Problem
    seed: int = 0  # of the tensors' values
    # The layouts of query, key, value and the gradient of out; see tensors.py.
    layouts: tuple[str, str, str, str] = ("contiguous",) * 4
    # With varlen, the rows of every tensor before the first sequence and after the last.
    unused_rows: tuple[int, int] = (0, 0)
    unbounded: int | None = None  # what a window bound of -1 is passed as
    dropout_p: float = 0.0
    return_debug_mask: bool = False
    # With varlen, these are the keys in use of each sequence. With dense tensors, PyTorch's kernel
    # ignores them.
    seqused_k: tuple[int, ...] | None = None
    backward: bool = False
    deterministic: bool = False
    speed_rules: bool = False
    # "ours-stock", "stock-ours": once more, the forward on the first and the backward on the other
    halves: str = ""
    # It says what is wrong with the call; see faults.py.
    fault: str = ""

    @property
    def layout(self) -> str:
        return "varlen" if self.problem.varlen else "dense"

    @property
    def fault_in_forward(self) -> bool:
        return bool(self.fault) and not FAULTS[self.fault].backward


def runs_on_ours(case: Case, largest_head_dim: int) -> bool:
    """Returns whether our kernels take the forward, where no speed rule leaves it to stock. This is
    written down without a look at the planner."""
    problem = case.problem
    rows_k = sum(problem.seqlens_k) + sum(case.unused_rows)
    keys = min(problem.max_k or rows_k, rows_k)
    head_dim = (
        problem.head_dim + -problem.head_dim % 8 if case.op == "functional" else problem.head_dim
    )
    _, right = problem.window
    return (
        not (case.fault_in_forward or case.dropout_p or case.return_debug_mask)
        and (case.layout == "varlen" or case.seqused_k is None)
        and head_dim % 8 == 0
        and head_dim <= largest_head_dim
        and (problem.scale is None or problem.scale > 0)
        and (problem.is_causal or not keys or not keys <= right < problem.max_k)
        and (case.op != "functional" or bool(fused_backend(case)))
        and not (problem.bias and BLACKWELL)
    )


def fused_backend(case: Case) -> str:
    """Returns which of its fused backends F.scaled_dot_product_attention takes a call to: cudnn,
    flash, efficient, or none. Flash attention takes no causal mask that is aligned top-left, and no
    bias. cuDNN and memory-efficient attention take a bias whose keys lie next to each other, the
    latter no heads in groups."""
    problem = case.problem
    if 0 in problem.seqlens_q + problem.seqlens_k:
        return ""
    if problem.bias and biases.make(problem, "meta").stride(-1) != 1:
        return ""
    aligned = problem.head_dim % 8 == 0
    if aligned and problem.max_k > 1 and not case.deterministic:
        return "cudnn"
    same = not problem.is_causal or problem.seqlens_q == problem.seqlens_k
    if same and not problem.bias:
        return "flash"
    return "efficient" if aligned and problem.heads == problem.heads_kv else ""


def faults_in_cudnn(case: Case) -> bool:
    """Returns whether cuDNN may read misaligned addresses of the case's bias, with our kernels
    registered and without them. That ends the CUDA context."""
    if not case.problem.bias:
        return False
    bias = biases.make(case.problem, "meta")
    in_rows = bias.stride(-1) == 1 and bias.size(-1) == case.problem.max_k
    return not in_rows or bias.storage_offset() * bias.element_size() % 16 != 0


def stock_agrees(case: Case) -> bool:
    """Returns whether PyTorch's kernels can run the case and compute the same function. This is
    written down without a look at ours."""
    left, right = case.problem.bounds
    left_alone = left >= 0 and right < 0
    heads_as_queries = case.problem.max_q == 1 and case.problem.heads > case.problem.heads_kv
    if case.layout == "varlen" and heads_as_queries and 0 in case.problem.seqlens_q:
        return False
    return (
        (not left_alone or case.problem.max_q <= case.problem.max_k)
        and 0 not in (sum(case.problem.seqlens_q), sum(case.problem.seqlens_k))
        and not set(case.layouts) & UNALIGNED
    )


def features(case: Case) -> set[str]:
    """Returns what is special about a case, in words that a summary counts."""
    problem = case.problem
    left, right = problem.window
    marks = {
        f"op {case.op}": True,
        f"{case.layout}": True,
        str(problem.dtype).removeprefix("torch."): True,
        "head dim a multiple of 8": problem.head_dim % 8 == 0,
        "head dim not a multiple of 8": problem.head_dim % 8 != 0,
        "GQA": problem.heads > problem.heads_kv > 1,
        "MQA": problem.heads > problem.heads_kv == 1,
        "causal": problem.is_causal,
        "window": max(left, right) >= 0,
        "window on one side": not problem.is_causal and (left < 0) != (right < 0),
        "window with causal": problem.is_causal and left >= 0,
        "causal, top-left, fewer queries": problem.top_left and problem.max_q < problem.max_k,
        "causal, top-left, more queries": problem.top_left and problem.max_q > problem.max_k,
        "window bound of 0": left == 0 or right == 0,
        "window bound beyond the keys": max(left, right) >= problem.max_k,
        "window bound below -1": min(left, right) < -1,
        "different lengths": problem.seqlens_q != problem.seqlens_k,
        "one query": problem.max_q == 1,
        "more than 1024 rows": max(problem.max_q, problem.max_k) > 1024,
        "empty sequence": case.layout == "varlen" and 0 in problem.seqlens_q + problem.seqlens_k,
        "no rows": 0 in (sum(problem.seqlens_q), sum(problem.seqlens_k)),
        "max above the longest": any(problem.slack),
        "unused rows": any(case.unused_rows),
        "scale": problem.scale is not None,
        "scale of 0": problem.scale == 0,
        "negative scale": problem.scale is not None and problem.scale < 0,
        "dropout": case.dropout_p > 0,
        "debug mask": case.return_debug_mask,
        "seqused_k": case.seqused_k is not None,
        "backward": case.backward,
        "deterministic": case.deterministic,
        "speed rules": case.speed_rules,
        "more queries than keys in a window": max(left, right) >= 0
        and any(q > k for q, k in zip(problem.seqlens_q, problem.seqlens_k, strict=True)),
        f"halves {case.halves}": bool(case.halves),
        f"bias {problem.bias}": bool(problem.bias),
        f"bias of form {problem.bias_form}": bool(problem.bias_form),
        f"bias in layout {problem.bias_layout}": bool(problem.bias),
    }
    named = {f"layout {layout}" for layout in case.layouts} | (
        {f"fault {case.fault}"} if case.fault else set()
    )
    return named | {mark for mark, holds in marks.items() if holds}


def parse(text: str) -> Case:
    """Returns the case that a failure printed."""
    return eval(text, {"Case": Case, "Problem": Problem, "torch": torch})
