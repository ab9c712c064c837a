"""The self-test's child, behind the fake device: with kernels that an interpreter runs they are
right, and where a launch does nothing they are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import fake_device
import pytest
from built import kernels
from interpreter.sources import compiling, programs

from kernels.kernel import Kernel, Op
from kernels.matrix import companions

ROOT = Path(__file__).parent.parent
# These are the problems of each kernel whose tiles an interpreter runs in seconds. The first kernel
# is compiled for tests/test_interpreter.py anyway.
INTERPRETED = {
    "sm90_decode_bf16_d64_any_m16n128": [0, 1, 3, 5, 6, 10, 12],
    "sm90_forward_bf16_d64_dense_causal_m64n64": [0, 4],
    "sm90_forward_bf16_d64_varlen_causal_m64n64": [0],
    "sm90_forward_bf16_d64_paged_causal_m192n128": [0],
    "sm90_backward_bf16_d64_varlen_causal_gqa_m128n128": [0],
    "sm90_backward_keys_bf16_d256_varlen_causal_m64n64": [0],
    "sm90_forward_bf16_d64_dense_bias_m128n128": [0, 1, 2, 4],
    "sm90_backward_keys_bf16_d64_dense_bias_m64n64": [1, 4],
}
# An entry's name begins with this, and does not say which tile it has.
MAPS = {f"kernel_cutlass_kernel_kernelssm90map_{by}" for by in ("queries", "keys")}
ENTRIES = {
    Op.FORWARD: {"kernel_cutlass_kernel_kernelssm90forward"},
    Op.DECODE: {"kernel_cutlass_kernel_kernelssm90decode"},
    Op.BACKWARD: {
        "kernel_cutlass_kernel_kernelscommonpreprocess",
        "kernel_cutlass_kernel_kernelssm90backward",
        "kernel_cutlass_kernel_flash_attncuteflash_bwd_postprocess",
    },
    Op.BACKWARD_KEYS: {
        "kernel_cutlass_kernel_kernelssm90backward_queries",
        "kernel_cutlass_kernel_kernelssm90backward_keys",
    },
}


def maps_of(kernel: Kernel) -> set[str]:
    """Returns the entries of the maps that a kernel with a bias is launched with."""
    maps = companions(kernel)[-2:]
    return {entry for entry in MAPS for launched in maps if launched and launched.op.value in entry}


def attempted(driver: Path, name: str, problems: list[int], interpreted: bool) -> dict:
    (kernel,) = (kernel for kernel in kernels() if kernel.name == name)
    launched: dict[str, str] = {}
    if interpreted:
        with compiling():
            launched = programs(kernel)
    request = {
        "kernel": name,
        "programs": launched,
        "capability": kernel.arch,
        "multiprocessors": 3,
        "problems": problems,
    }
    imported = (ROOT, ROOT / "tests", ROOT / "tests" / "gpu", ROOT / "build" / "tests")
    script = ROOT / "tests" / "interpreter" / "selftest.py"
    (found,) = fake_device.printed(
        driver, script, imported=imported, asked=json.dumps(request), timeout=600
    )
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if "decode" in name else pytest.mark.long)
        for name in INTERPRETED
    ],
)
def test_a_kernel_that_runs_is_right(driver, name):
    found = attempted(driver, name, INTERPRETED[name], interpreted=True)
    assert (found["status"], found["detail"]) == ("right", ""), found


@pytest.mark.parametrize(
    "name",
    [
        "sm90_forward_bf16_d64_dense_causal_m64n64",
        "sm90_backward_bf16_d64_dense_full_mha_m128n128",
        "sm90_backward_bf16_d128_varlen_causal_gqa_m64n128",
        "sm90_backward_keys_bf16_d256_dense_causal_m64n64",
        "sm90_forward_bf16_d64_dense_bias_m128n128",
        "sm90_backward_keys_bf16_d64_dense_bias_m64n64",
    ],
)
def test_a_kernel_that_writes_nothing_is_wrong_and_no_other_one_is_launched(driver, name):
    found = attempted(driver, name, [0], interpreted=False)
    assert found["status"] == "wrong" and "isnan differs in " in found["detail"], found
    (kernel,) = (kernel for kernel in kernels() if kernel.name == name)
    expected = ENTRIES[kernel.op] | maps_of(kernel)
    entries = {
        entry for launched in found["launched"] for entry in expected if launched.startswith(entry)
    }
    assert entries == expected and len(found["launched"]) == len(entries), found
