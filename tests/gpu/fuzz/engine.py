"""Defines what the cases run on: the GPU, the registration of our kernels, and their
explanations."""

from __future__ import annotations

import torch
from cases import HEAD_DIMS, Inputs, poison

import fa4_ext
from fuzz.case import Case, faults_in_cudnn, runs_on_ours
from fuzz.faults import FAULTS, Arguments
from fuzz.ops import TorchOps, heads_first

SM_COUNT = 132  # of an H200, to plan for without a device


class Engine:
    """Runs PyTorch's ops on the current CUDA device. Nothing else may be registered."""

    device = "cuda"

    def __init__(self):
        self.ops = TorchOps()
        self.largest_head_dim = max(HEAD_DIMS)

    def cannot_run(self, case: Case) -> str:
        """Returns why this machine has no way to run a case, or nothing."""
        if case.op == "inplace" and not self.ops.inplace_forward:
            return "torch has the in-place op since 2.12"
        if not runs_on_ours(case, self.largest_head_dim) and faults_in_cudnn(case):
            return "cuDNN reads misaligned addresses"
        if case.fault and torch.cuda.device_count() < FAULTS[case.fault].devices:
            return "needs two GPUs"
        return ""

    @staticmethod
    def registered(*, strict: bool, speed_rules: bool) -> fa4_ext.Handle:
        """Registers our kernels, as a context manager. With `strict`, what they do not run is an
        error."""
        return fa4_ext.register(fallback="error" if strict else "stock", speed_rules=speed_rules)

    @staticmethod
    def poison(inputs: Inputs) -> None:
        poison(inputs)

    @staticmethod
    def explain(case: Case, arguments: Arguments, *, backward: bool) -> bool:
        """Returns whether our kernels run it."""
        return explain(case, arguments, backward=backward)[0]

    @staticmethod
    def synchronize() -> None:
        torch.cuda.synchronize()


def explain(
    case: Case, arguments: Arguments, *, backward: bool, capability: tuple[int, int] | None = None
) -> tuple[bool, str]:
    """Returns whether our kernels run it, and why not. F.scaled_dot_product_attention is explained
    by the rules of the registration in force.

    capability: of the device to plan for; None: the tensors' own.
    """
    if case.op == "functional":
        options = {name: arguments[name] for name in ("dropout_p", "is_causal", "scale")}
        options |= {
            "enable_gqa": case.problem.heads != case.problem.heads_kv,
            "deterministic": case.deterministic,
            "attn_mask": arguments["attn_mask"],
        }
        told = fa4_ext.explain(
            *heads_first(case, arguments),
            **options,
            backward=backward,
            device_capability=capability,
        )
        return told.supported, told.reason
    forward = {name: value for name, value in arguments.items() if name != "out"}
    # explain does not know of it.
    if case.op == "inplace" and _kind(arguments["out"]) != _kind(arguments["query"]):
        return False, "out must have query's shape, dtype and device"
    number, sm_count = (10 * capability[0] + capability[1], SM_COUNT) if capability else (0, 0)
    supported, _, reason, *_ = torch.ops.fa4_ext.explain(
        **forward, block_table=None, num_splits=None, deterministic=case.deterministic,
        backward=backward,
        speed_rules=case.speed_rules, capability=number, sm_count=sm_count,
    )  # fmt: skip
    return supported, reason


def _kind(t: torch.Tensor) -> tuple:
    return t.shape, t.dtype, t.device
