"""Runs code for a test in a process of its own, where nothing has been initialised."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import fa4_ext


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment in which a process finds the fa4_ext that this one has imported,
    installed or not."""
    path = os.pathsep.join(
        [str(Path(fa4_ext.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return {**os.environ, "PYTHONPATH": path, **variables}


def run_script(code: str, *, timeout: float = 120, **variables: str) -> str:
    """Runs `code` in a fresh interpreter and returns its output, or raises an AssertionError with
    it."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=timeout, env=environment(**variables),
        cwd=os.path.dirname(__file__),
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
