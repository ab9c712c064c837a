"""Building says in one sentence what is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import tomllib

from scripts.tools import build_backend

ROOT = Path(__file__).parent.parent


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_missing_compiler_is_named_with_what_to_install():
    done = setup("build_ext", CXX="/nowhere/c++ -O2")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "the C++ compiler '/nowhere/c++' was not found; install one of C++17, on Debian or Ubuntu "
        "with: apt-get install g++"
    )


def test_an_isolated_build_gets_what_the_requirements_list():
    wanted = build_backend.get_requires_for_build_wheel()
    for package in (
        "torch",
        "flash-attn-4",
        "nvidia-cutlass-dsl[cu13]",
        "cmake",
        "ninja",
        "nvidia-cuda-runtime",
    ):
        assert any(re.match(rf"{re.escape(package)}[=>]=", line) for line in wanted), (
            package,
            wanted,
        )


def test_the_backend_needs_nothing_before_it_has_read_the_requirements():
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert build_system["requires"] == ["setuptools>=77"]
