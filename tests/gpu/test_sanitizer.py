"""compute-sanitizer finds nothing in a small set of calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from fresh_process import environment


def _sanitizer() -> str:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(toolkit)
    )
    if not found:
        pytest.skip("compute-sanitizer is not installed")
    return found


WATCHED = (*product(("memcheck", "racecheck"), ("forward", "backward")), ("memcheck", "fuzz"))


@pytest.mark.parametrize(("tool", "what"), WATCHED, ids=["-".join(pair) for pair in WATCHED])
def test_sanitizer(tool, what):
    """Without the caching allocator every tensor is an allocation of its own, so that a step beyond
    it is seen."""
    options = ("--report-api-errors", "no") if tool == "memcheck" else ()
    script = Path(__file__).with_name("sanitize.py")
    watched = (sys.executable, str(script), what, tool)
    done = subprocess.run(
        [_sanitizer(), "--tool", tool, *options, "--kernel-regex", "kns=kernel_cutlass", *watched],
        capture_output=True, text=True, timeout=150,
        env=environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    errors = re.search(
        r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error)",
        output,
    )
    assert errors and int(errors[1] or errors[2]) == 0, output[-4000:]
