"""Checks errors as programs get them, without a GPU: the overrides run on tensors of the CPU,
behind a CUDA driver and a C interface of torch that fail when told to.
tests/gpu/test_out_of_memory.py has the memory of a GPU run out."""

from __future__ import annotations

from functools import partial

import fake_device
import pytest
import torch

from kernels import configs_sm90
from kernels.kernel import Layout, Mask

CPU_BUILD = pytest.mark.skipif(
    torch.version.cuda is not None, reason="a CUDA build of torch fails otherwise without a GPU"
)
FORWARD = [
    [[2, 129, 4, 128], [66048, 512, 128, 1], "torch.bfloat16"],
    [[2, 4, 129], [516, 129, 1], "torch.float32"],
    [[2], [1], "torch.uint64"], [[], [], "torch.uint64"], [[0], [1], "torch.bfloat16"],
]  # fmt: skip
BACKWARD = 3 * FORWARD[:1]
BF16 = FORWARD[0][2]
KERNEL = next(configs_sm90.forward("bf16", (128, 128), Layout.DENSE, Mask.CAUSAL)).name
DECODE = next(configs_sm90.decode("bf16", (128, 128))).name  # of few rows


@pytest.fixture
def outcomes(driver):
    """Returns what errors.py prints."""
    return partial(fake_device.reported, driver, "errors.py")


@CPU_BUILD
def test_an_allocation_that_fails_is_asked_for_again_and_raises_torchs_error(outcomes):
    right, once, every, gradients, gradients_again, forward, backward, after = outcomes(
        "allocation"
    )
    assert [right["results"], once["results"], every["results"], after["results"]] == 4 * [FORWARD]
    assert [gradients["results"], gradients_again["results"]] == 2 * [BACKWARD]
    # The error has a type that no C function tells, nor could a RuntimeError stand in for it.
    for error in (forward, backward):
        assert error["type"] == "NotImplementedError", error
        assert error["text"].startswith(
            "Could not run 'aten::empty_strided' with arguments from the 'CUDA' backend"
        ), error


def test_a_copy_that_fails_is_made_again_and_raises_torchs_error(outcomes):
    again, overlapping = outcomes("copy")
    assert again["results"] == FORWARD[1:2]
    assert overlapping["type"] == "RuntimeError" and overlapping["text"].startswith(
        "unsupported operation: more than one element of"
    )


# The columns say what fails and with which CUresult, the MiB of free memory, and whether memory is
# what lacks.
MODULE = {
    "launch_unknown_and_full": ("launch_result", 999, 3, True),
    "launch_out_of_memory": ("launch_result", 2, 70_000, True),
    "function_out_of_memory": ("function_result", 2, 3, True),
    "library_out_of_memory": ("load_result", 2, 3, True),
    "launch_unknown": ("launch_result", 999, 70_000, False),
    "launch_invalid_value": ("launch_result", 1, 70_000, False),
    "launch_invalid_value_and_full": ("launch_result", 1, 3, True),
}


@pytest.mark.parametrize("case", MODULE)
def test_a_kernel_that_cannot_be_loaded_is_named(outcomes, case):
    """The call after it, when memory is there, is right. A kernel that is loaded already fails at
    its launch."""
    failing, result, free, out_of_memory = MODULE[case]
    first, then, later = outcomes("module", failing, result, free)
    assert first["out_of_memory"] == out_of_memory, first
    assert f"loading kernel {KERNEL} (" in first["text"] and ") failed: " in first["text"], first
    beginning = (
        f"CUDA out of memory. With {free} MiB of device memory free, loading kernel "
        if out_of_memory
        else "loading kernel "
    )
    assert first["text"].startswith(beginning), first
    assert then["results"] == FORWARD
    if failing != "launch_result":
        assert later["results"] == FORWARD
    elif result != 2:
        assert (
            later["text"].startswith(f"launching kernel {KERNEL} failed: ")
            and not later["out_of_memory"]
        ), later


@pytest.mark.parametrize(
    ("result", "active"), [(912, -1), (0, 0)], ids=["invalid_cluster_size", "none_active"]
)
def test_clusters_that_do_not_fit_become_smaller(outcomes, result, active):
    small, usual = outcomes("clusters", result, active)
    assert small["results"] == usual["results"] == [[[2, 1, 4, 128], [512, 512, 128, 1], BF16]]


@pytest.mark.parametrize(
    ("result", "name"), [(201, "CUDA_ERROR_INVALID_CONTEXT"), (999, "CUDA_ERROR_UNKNOWN")]
)
def test_another_error_about_clusters_is_raised(outcomes, result, name):
    raised, after = outcomes("clusters", result, -1)
    assert raised.get("type") == "RuntimeError", raised
    assert f"kernel {DECODE} (its first launch) failed: {name} (" in raised["text"], raised
    assert "results" in after


def test_a_launch_in_another_context_that_fails_says_what_was_done(outcomes):
    first, failed, full, unknown_sms = outcomes("context")
    assert first["results"] == FORWARD
    failure = f"loading or launching kernel {KERNEL} failed: error (error)"
    assert failed["text"] == failure and not failed["out_of_memory"]
    beginning = "CUDA out of memory. With 3 MiB of device memory free, "
    assert full["text"] == beginning + failure and full["out_of_memory"]
    assert unknown_sms.get("results") == FORWARD, unknown_sms


@CPU_BUILD
def test_a_tensor_without_a_handle_ends_no_process(outcomes):
    *raised, after = outcomes("undefined")
    assert [error.get("type") for error in raised] == ["RuntimeError"] * 2, raised
    assert after["results"] == FORWARD


def test_results_stand_what_relies_on_the_schema(outcomes):
    """A custom_op around the op, torch's check of schemas and torch.save work, and no result shares
    memory with another or with an input."""
    custom_op, shared, loaded = outcomes("results")
    assert custom_op.get("results") == FORWARD[:4], custom_op
    assert len(set(shared["storages"])) == len(shared["storages"]) == 3 + 5 + 3, shared
    assert loaded["results"] == FORWARD


def test_a_driver_that_is_too_old_is_asked_once(outcomes):
    """Looking for it at every call cost 12 to 93 us."""
    *errors, asked = outcomes("driver")
    assert len(errors) == 3 and all(
        "the CUDA driver is too old: it is for CUDA 12.8" in error["text"] for error in errors
    ), errors
    assert asked["questions"] == 0, f"it was asked {asked['questions']} times more"
