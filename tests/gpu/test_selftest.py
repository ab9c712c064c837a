"""python -m fa4_ext selftest on a GPU: every kernel is right, and what is not is told apart."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fresh_process import environment

import fa4_ext
from fa4_ext import _environment, _library
from fa4_ext.selftest import command
from fa4_ext.selftest.supervisor import CRASHED, HUNG, Limits, supervise

ARCH = _environment.ARCHS[torch.cuda.get_device_capability()] if torch.cuda.is_available() else 90
OURS = command.select(_library.manifest(), ARCH, ["*"])
FORWARDS = [kernel["name"] for kernel in OURS if kernel["op"] == "forward"]
SECONDS = 180  # for the kernels of a full wheel on an H100


def selftest(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fa4_ext", "selftest", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment(**variables),
        cwd=Path(__file__).parent,
    )


def test_every_kernel_is_right_whatever_is_disabled(tmp_path):
    path, begin = tmp_path / "report.json", time.monotonic()
    done = selftest("--json", str(path), FA4_EXT_DISABLE="*_backward_*")
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = time.monotonic() - begin
    found = json.loads(path.read_text())
    print(f"{len(found['kernels'])} kernels in {seconds:.0f} s")
    assert found["ok"] and found["disable"] == []
    assert {row["kernel"] for row in found["kernels"]} == {kernel["name"] for kernel in OURS}
    assert {row["status"] for row in found["kernels"]} == {"right"}
    assert found["build"] == fa4_ext.build_info()
    assert done.stdout.splitlines()[-1] == "Nothing is wrong"
    assert seconds < SECONDS


def test_a_pattern_runs_some_kernels_alone():
    done = selftest("--kernels", f"sm{ARCH}_preprocess_bf16_d64_*")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.split()[1:2]]
    assert "preprocess" in rows and "backward" not in rows, done.stdout


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("hangs", HUNG, "no answer in 10 s"),
        ("is wrong", "wrong", "out: error "),
        ("breaks the context", CRASHED, "device-side assert"),
    ],
)
def test_one_broken_kernel_is_told_from_the_others(fault, status, words):
    names = FORWARDS[:4]
    script = Path(__file__).with_name("faulty_child.py")
    child = [sys.executable, str(script), "0", json.dumps({names[1]: fault})]
    limits = Limits(kernel=10) if fault == "hangs" else Limits()
    found = list(supervise(child, names, limits, command.environment()))
    assert [outcome.kernel for outcome in found] == names
    assert [outcome.status for outcome in found] == ["right", status, "right", "right"], found
    assert words in found[1].detail, found[1]
