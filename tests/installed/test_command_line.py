"""python -m fa4_ext on a machine without a GPU."""

from __future__ import annotations

import pytest
from processes import python

import fa4_ext
from fa4_ext import _dispatcher


def command(*arguments: str, **environment: str) -> str:
    result = python("-m", "fa4_ext", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("autoregister", ["", "0"])
def test_demo_shows_the_registration_and_the_plans_and_says_what_did_not_run(autoregister):
    text = command("demo", FA4_EXT_AUTOREGISTER=autoregister)
    during = [line for line in text.splitlines() if "during" in line]
    outside = [line.split(None, 1) for line in text.splitlines() if line.split(None, 1)[:1] in (["before"], ["after"])]
    assert len(during) == len(_dispatcher.OPS) and all("fa4_ext" in line for line in during)
    assert [entry for when, entry in outside if when == "before"] == [entry for when, entry in outside if when == "after"]
    for arch in fa4_ext.build_info()["archs"]:
        assert f"runs sm{arch}_forward_" in text and f"runs sm{arch}_backward_" in text
    assert "left to PyTorch's own kernels: dropout_p must be 0" in text
    assert "Attention itself was NOT run" in text and "no CUDA device is available" in text


def test_status_names_versions_device_and_registration():
    text = command("status")
    assert "no CUDA device is available" in text and "active fallback='stock'" in text
    assert "none, FA4_EXT_AUTOREGISTER is 0" in command("status", FA4_EXT_AUTOREGISTER="0")


def test_kernels_lists_every_kernel():
    lines = command("kernels").splitlines()
    assert [line.split()[0] for line in lines[1:]] == [kernel.name for kernel in fa4_ext.kernels()]


def test_explain_answers_for_forward_and_backward():
    text = command("explain", "--q", "2x16x4096x128", "--kv-heads", "4", "--causal", "--dtype", "bf16", "--device", "sm90")
    forward, backward = text.splitlines()
    assert forward.startswith("forward   runs sm90_forward_bf16_d128_dense_causal_")
    assert backward.startswith("backward  runs sm90_backward_bf16_d128_dense_causal_gqa_")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: command"),
        (("explain", "--q", "2x16x4096", "--device", "sm90"), "'2x16x4096' is not batch x heads x seqlen x head_dim"),
        (("explain", "--q", "2x16x4096x128", "--device", "hopper"), "'hopper' is not a device such as sm90"),
        (("explain", "--q", "2x16x4096x128"), "name one with --device"),
    ],
)
def test_wrong_usage_says_what_is_wrong(arguments, message):
    result = python("-m", "fa4_ext", *arguments)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
