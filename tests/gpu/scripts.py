"""Code that a test runs in a process of its own, where nothing has been initialised."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def run_script(code: str, *, timeout: float = 120, **environment: str) -> str:
    """Runs `code` in a fresh interpreter; its output, or an AssertionError with it."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}, cwd=os.path.dirname(__file__),
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
