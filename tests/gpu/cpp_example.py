"""Builds examples/cpp against the fa4_ext and the torch that this process imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

import fa4_ext

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"


def tool(name: str) -> str | None:
    """Returns a program of this environment or, failing that, of the machine."""
    path = Path(sysconfig.get_path("scripts"), name)
    return str(path) if path.exists() else shutil.which(name)


def run(*command: str | Path, timeout: float = 600, **variables: str) -> str:
    """Returns a command's output, or raises an AssertionError with it."""
    arguments = [str(part) for part in command]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=timeout, env={**os.environ, **variables}
    )
    assert done.returncode == 0, (
        f"{arguments} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


def configure(
    source: Path, build: Path, *options: str, prefix: str = fa4_ext.cmake_prefix_path
) -> str:
    make = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    return run(
        tool("cmake"),
        "-S",
        source,
        "-B",
        build,
        "-G",
        "Ninja",
        make,
        f"-DCMAKE_PREFIX_PATH={prefix}",
        *options,
    )


def build_programs(folder: Path) -> Path:
    """Builds sdpa and aoti into `folder`."""
    configure(EXAMPLE, folder, f"-DTORCH_DIR={torch.__path__[0]}")
    run(tool("cmake"), "--build", folder, "--parallel", "2")
    return folder


def export_package(path: Path, **variables: str) -> Path:
    """Compiles the model that aoti runs."""
    run(sys.executable, EXAMPLE / "export_aoti.py", path, **variables)
    return path
