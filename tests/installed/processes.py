"""Runs Python in a process of its own, where a test is about what a whole process sees."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import fa4_ext

# This process found fa4_ext here, installed or not.
PACKAGES = str(Path(fa4_ext.__file__).parents[1])


# Torch says so once a process where NumPy is not installed, as it need not be.
QUIET = "ignore:Failed to initialize NumPy:UserWarning"


def python(
    *arguments: str, asked: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the interpreter without a GPU in sight; CUDA devices are hidden, and the package's own
    settings are unset.

    asked: what it reads on standard input.
    """
    variables = {name: value for name, value in (os.environ | environment).items() if value}
    for setting in ("AUTOLOAD", "AUTOREGISTER", "DISABLE", "PROVIDES"):
        variables.pop(f"FA4_EXT_{setting}", None)
    path = os.pathsep.join([PACKAGES, *filter(None, [variables.get("PYTHONPATH")])])
    variables |= {
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONPATH": path,
        "PYTHONWARNINGS": QUIET,
        **environment,
    }
    # Python looks for modules where it is started, too: not in the checkout.
    command, folder = [sys.executable, *arguments], Path(__file__).parent
    return subprocess.run(
        command, input=asked, capture_output=True, text=True, timeout=300, env=variables, cwd=folder
    )


def run(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code that must succeed."""
    result = python(*options, "-c", textwrap.dedent(code), **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result
