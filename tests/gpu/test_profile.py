"""What torch.profiler shows of a call: the planned kernel's name, inside its op."""

from __future__ import annotations

import pytest
import torch
from calls import run_autograd, run_flash
from cases import DEVICE, dense, make_inputs, varlen
from torch.profiler import ProfilerActivity, profile

import fa4_ext

OPS = {"flash": "aten::_flash_attention", "sdpa": "aten::_scaled_dot_product_flash_attention"}


def ranges_of(work) -> dict[str, str | None]:
    """Returns the names of the host events of `work()`, and the name of the event that each is
    in."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    host = [
        event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU
    ]
    return {event.name: event.cpu_parent.name if event.cpu_parent else None for event in host}


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("way", OPS)
@pytest.mark.parametrize("heads_kv", (4, 2))
def test_a_range_with_the_kernel_s_name_is_inside_the_op(way, heads_kv):
    problem = dense(256, 256, is_causal=True, heads=4, heads_kv=heads_kv)
    inputs = make_inputs(problem)
    run = run_autograd if way == "sdpa" else run_flash
    found = ranges_of(lambda: run(problem, inputs, backward=True))
    tensors = [t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v)]
    for op, backward in ((OPS[way], False), (f"{OPS[way]}_backward", True)):
        plan = fa4_ext.explain(*tensors, is_causal=True, enable_gqa=True, backward=backward)
        expected = op if backward or way == "sdpa" else f"{op}_forward"
        assert plan.kernel in found, f"no range {plan.kernel} among {sorted(found)}"
        assert found[plan.kernel] == expected, (
            f"{plan.kernel} is in {found[plan.kernel]}, expected {expected}"
        )


@pytest.mark.usefixtures("strict")
def test_a_varlen_call_has_a_range_too():
    problem = varlen((100, 200, 600))
    inputs = make_inputs(problem)
    found = ranges_of(lambda: run_flash(problem, inputs, backward=True))
    for direction in ("forward", "backward"):
        names = [name for name in found if f"_{direction}_bf16_d128_varlen_" in name]
        assert len(names) == 1, f"ranges of the {direction}: {names} among {sorted(found)}"


def test_a_call_of_the_stock_kernel_has_none(lenient):
    q, k, v = (torch.randn(2, 4, 256, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    call = torch.ops.aten._scaled_dot_product_flash_attention
    # Calls with dropout are stock's.
    found = ranges_of(lambda: call(q, k, v, 0.1, False, False))
    names = {kernel.name for kernel in fa4_ext.kernels()}
    assert not names & set(found), (
        f"ranges {names & set(found)} of a call that ran PyTorch's own kernel"
    )
