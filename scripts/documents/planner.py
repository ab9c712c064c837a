"""Asks the planner about a call, for the documents."""

from pathlib import Path

import fa4_core
import torch

import fa4_ext  # noqa: F401 (torch.ops.fa4_ext)
from scripts.core_problem import SM_COUNT, core_problem

ROOT = Path(__file__).parents[2]
# This call runs; the documents change it.
BASE = {
    "op": "forward", "dtype": "bf16", "layout": "dense", "batch": 2, "seqlen_q": 4096,
    "seqlen_k": 4096, "total_q": 8192,
    "total_k": 8192, "num_heads": 8, "num_heads_kv": 8, "head_dim": 128, "head_dim_v": 128,
    "is_causal": False,
    "window_size_left": -1, "window_size_right": -1, "deterministic": False,
}  # fmt: skip


def plan(problem: dict, speed_rules: bool = False, disabled: tuple[str, ...] = ()):
    """Without the kernels whose names match one of the disabled patterns."""
    return fa4_core.plan(
        core_problem(problem), speed_rules, disabled=fa4_core.KernelSet(list(disabled))
    )


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def explain_op(
    capability: int = 90, tensors: tuple[torch.Tensor, ...] = (), **arguments
) -> tuple[bool, str, str]:
    """Asks torch.ops.fa4_ext.explain about a call that runs but for these arguments, which need not
    be in the planner's problem."""
    tensors = tensors or (meta(2, 512, 8, 128),) * 3
    absent = ("cum_seq_q", "cum_seq_k", "scale", "window_size_left", "window_size_right")
    call = dict.fromkeys((*absent, "seqused_k", "alibi_slopes", "block_table", "num_splits"))
    call |= dict.fromkeys(
        ("is_causal", "return_debug_mask", "deterministic", "backward", "speed_rules"), False
    )
    call |= {
        "max_q": 512,
        "max_k": 512,
        "dropout_p": 0.0,
        "capability": capability,
        "sm_count": SM_COUNT[capability],
    }
    return torch.ops.fa4_ext.explain(*tensors, **(call | arguments))
