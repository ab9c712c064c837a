"""This module runs one real forward and backward on a GPU. It says whether the results are right,
how long the first calls take, and how much memory their kernels fill."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa4_ext

# [batch, heads, seqlen, head_dim], whose kernels every subset of the matrix holds
SHAPE = (2, 8, 1024, 128)

# The largest relative error against fp32 that is right. bf16 rounds by up to 2**-9 and these
# results carry a few roundings; a wrong kernel is wrong by a multiple of its results.
BOUND = 0.01


@dataclass(frozen=True)
class KernelRun:
    device: str
    kernels: tuple[str | None, ...]  # names of the forward's and the backward's kernel
    errors: dict[str, float]  # relative errors of the output and of each gradient
    bound: float  # the largest relative error that is right
    milliseconds: tuple[float, float]  # the process's first calls, which load the kernels
    module_bytes: int  # device memory that loading them took

    @property
    def right(self) -> bool:
        return all(error <= self.bound for error in self.errors.values())  # False for NaN


def run(device: int) -> KernelRun:
    """Runs F.scaled_dot_product_attention on our kernels, on the CUDA device of this index.

    Raises:
        RuntimeError: the kernels could not be run.
    """
    with torch.cuda.device(device):
        inputs = [
            torch.randn(SHAPE, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for _ in range(3)
        ]
        grad = torch.randn(SHAPE, dtype=torch.bfloat16, device="cuda")
        # Autograd's thread starts before anything is measured, and torch imports what it needs for
        # the first gradient that is passed to it.
        one = torch.ones(1, device="cuda", requires_grad=True)
        torch.autograd.grad(one.exp(), one, torch.ones_like(one))
        # "error": a call that went to the stock kernel would prove nothing.
        with (
            fa4_ext.register(fallback="error", speed_rules=False),
            sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        ):
            kernels = tuple(
                fa4_ext.explain(*inputs, is_causal=True, backward=backward).kernel
                for backward in (False, True)
            )
            out, forward_ms, forward_bytes = _first(
                lambda: F.scaled_dot_product_attention(*inputs, is_causal=True)
            )
            grads, backward_ms, backward_bytes = _first(
                lambda: torch.autograd.grad(out, inputs, grad)
            )
        exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
        with sdpa_kernel(SDPBackend.MATH):
            exact_out = F.scaled_dot_product_attention(*exact, is_causal=True)
        exact_grads = torch.autograd.grad(exact_out, exact, grad.float())
        results = zip(
            ("out", "dq", "dk", "dv"), (out, *grads), (exact_out, *exact_grads), strict=True
        )
        errors = {name: _error(ours, right) for name, ours, right in results}
        name = torch.cuda.get_device_name()
        return KernelRun(
            name, kernels, errors, BOUND, (forward_ms, backward_ms), forward_bytes + backward_bytes
        )


def _first(call):
    """Returns the result of a call, its milliseconds, and the bytes of device memory that it took
    outside torch's allocator."""
    torch.cuda.synchronize()
    before = _bytes_beside_torch()
    begin = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    milliseconds = 1000 * (time.perf_counter() - begin)
    return result, milliseconds, max(0, _bytes_beside_torch() - before)


def _bytes_beside_torch() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.detach().float() - exact).norm() / exact.norm()).item()
