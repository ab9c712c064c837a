"""python -m fa4_ext doctor where there is a GPU: every check, and one real kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fresh_process import environment


def doctor(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fa4_ext", "doctor", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**variables),
        cwd=Path(__file__).parent,
    )


def test_nothing_is_wrong_and_the_kernel_check_ran():
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = {
        line.split()[1]: line.split()[0] for line in done.stdout.partition("\n\n")[0].splitlines()
    }
    assert {
        name: statuses[name] for name in ("library", "driver", "registration", "sdpa", "kernel")
    } == dict.fromkeys(("library", "driver", "registration", "sdpa", "kernel"), "ok")
    assert "relative errors against fp32" in done.stdout and "MiB of device memory" in done.stdout


def test_kernel_check_measures_its_modules_and_errors():
    done = doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    kernel = json.loads(done.stdout)["kernel"]
    print(kernel)
    assert set(kernel["errors"]) == {"out", "dq", "dk", "dv"} and all(
        0 < error <= kernel["bound"] for error in kernel["errors"].values()
    )
    assert all(0 < milliseconds < 1000 for milliseconds in kernel["milliseconds"])
    assert kernel["module_bytes"] < 2**28


def test_no_gpu_touches_none():
    done = doctor("--no-gpu", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["kernel"] is None and not [
        check for check in report["checks"] if check["name"].startswith("GPU")
    ]


def test_hidden_gpus_are_wrong():
    done = doctor(CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 1 and "this process sees no GPU" in done.stdout
