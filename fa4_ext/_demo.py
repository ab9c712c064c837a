"""This module is the demonstration behind `python -m fa4_ext demo`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa4_ext
from fa4_ext import _dispatcher, _environment


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    heads_kv: int
    seqlen: int
    head_dim: int
    is_causal: bool

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        return (
            f"B{self.batch} H{heads} S{self.seqlen} D{self.head_dim} "
            f"{'causal' if self.is_causal else 'full'}"
        )

    @property
    def options(self) -> dict:
        return {"is_causal": self.is_causal, "enable_gqa": self.heads != self.heads_kv}

    def inputs(self, device: str) -> list[torch.Tensor]:
        shapes = [
            (self.batch, heads, self.seqlen, self.head_dim)
            for heads in (self.heads, self.heads_kv, self.heads_kv)
        ]
        return [
            torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
            for shape in shapes
        ]

    def flop(self, backward: bool) -> float:
        """Counts the operations of the matrix products: two in a forward, five in a backward."""
        forward = (
            4
            * self.batch
            * self.heads
            * self.seqlen**2
            * self.head_dim
            * (0.5 if self.is_causal else 1)
        )
        return 2.5 * forward if backward else forward


CASES = (
    Case(4, 16, 16, 1024, 64, False),
    Case(2, 16, 16, 4096, 128, False),
    Case(2, 16, 16, 4096, 128, True),
    Case(2, 32, 8, 4096, 128, True),
    Case(4, 16, 16, 2048, 96, True),
)


def run() -> None:
    if fa4_ext.default_handle is not None:
        fa4_ext.default_handle.remove()  # the demonstration starts from PyTorch as it is
    _show_registration()
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability in _environment.ARCHS:
        _run_attention()
    else:
        _show_plans()
        what = (
            "no CUDA device is available"
            if capability is None
            else "the GPU's is {}.{}".format(*capability)
        )
        print(
            "\nAttention itself was NOT run: the kernels need compute capability 9.0 (Hopper), "
            f"10.0 or 10.3 (Blackwell); {what}."
        )


def _show_registration() -> None:
    print("The dispatcher's CUDA entry of each op: before, while and after fa4_ext is registered")
    before = {op: _dispatcher.entry(op) for op in _dispatcher.OPS}
    with fa4_ext.register():
        during = {op: _dispatcher.entry(op) for op in _dispatcher.OPS}
    for op in _dispatcher.OPS:
        print(f"  aten::{op}")
        for when, entry in (
            ("before", before[op]),
            ("during", during[op]),
            ("after", _dispatcher.entry(op)),
        ):
            print(f"    {when}  {entry}")


def _show_plans() -> None:
    calls: list[tuple[Case, dict]] = [(case, {}) for case in CASES]
    calls.append((CASES[1], {"dropout_p": 0.1}))
    for capability in ((9, 0), (10, 0)):
        print(
            "\nThe plan of F.scaled_dot_product_attention calls, bf16, on compute capability "
            f"{capability[0]}.{capability[1]}"
        )
        for case, more in calls:
            inputs = case.inputs("meta")
            print(f"  {case}" + "".join(f" {name}={value}" for name, value in more.items()))
            for direction, backward in (("forward", False), ("backward", True)):
                plan = fa4_ext.explain(
                    *inputs, **case.options | more, backward=backward, device_capability=capability
                )
                print(f"    {direction:8}  {plan}")


def _run_attention() -> None:
    print(
        f"\nAttention on {torch.cuda.get_device_name()}, bf16: relative error against fp32, time "
        "and TFLOP/s"
    )
    # Without this, cuBLAS warns that autograd's thread has no context.
    torch.ones(1, device="cuda", requires_grad=True).exp().backward()
    for case in CASES:
        inputs = case.inputs("cuda")
        print(f"  {case}")
        reference = _results(inputs, case, backend=SDPBackend.MATH, dtype=torch.float32)
        _measure("stock", inputs, case, reference, ("FlashAttention-2", "FlashAttention-2"))
        plans = [
            fa4_ext.explain(*inputs, **case.options, backward=backward)
            for backward in (False, True)
        ]
        # Where our kernels are planned, an error replaces the fallback: the plan shown is what ran.
        with fa4_ext.register(
            fallback="error" if all(plan.supported for plan in plans) else "stock"
        ):
            _measure("ours", inputs, case, reference, tuple(str(plan) for plan in plans))


def _measure(who: str, inputs, case: Case, reference, kernels: tuple[str, ...]) -> None:
    out, *grads = _results(inputs, case)
    errors = (_relative_error([out], reference[:1]), _relative_error(grads, reference[1:]))
    milliseconds = _times(inputs, case)
    for backward, direction in enumerate(("forward", "backward")):
        rate = case.flop(bool(backward)) / milliseconds[backward] / 1e9
        print(
            f"    {who:5}  {direction:8}  error {errors[backward]:.1e}  "
            f"{milliseconds[backward]:8.3f} ms  {rate:4.0f} TFLOP/s"
            f"  {kernels[backward]}"
        )


def _results(
    inputs, case: Case, backend=SDPBackend.FLASH_ATTENTION, dtype=torch.bfloat16
) -> list[torch.Tensor]:
    """Returns the output and the gradients of query, key and value."""
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*inputs, **case.options)
    grad = (
        torch.linspace(-1, 1, case.head_dim, device=out.device, dtype=dtype)
        .expand_as(out)
        .contiguous()
    )
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def _relative_error(tensors, references) -> float:
    return max(
        ((a.float() - b).norm() / b.norm()).item() for a, b in zip(tensors, references, strict=True)
    )


def _times(inputs, case: Case, repetitions: int = 20) -> tuple[float, float]:
    """Returns the median milliseconds of a forward and of a backward."""
    samples: tuple[list[float], list[float]] = ([], [])
    grad = torch.randn_like(inputs[0])
    for _ in range(repetitions):
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda._sleep(1_000_000)  # the host runs ahead, so that its own time is not counted
        start.record()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*inputs, **case.options)
        middle.record()
        torch.autograd.grad(out, inputs, grad)
        end.record()
        torch.cuda.synchronize()
        samples[0].append(start.elapsed_time(middle))
        samples[1].append(middle.elapsed_time(end))
    return statistics.median(samples[0]), statistics.median(samples[1])
