"""Copies the package, so that copies can be damaged, hidden or read by many."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from processes import python

import fa4_ext

PACKAGE = Path(fa4_ext.__file__).parent


def copy_package(folder: Path, *, library: bool = True) -> Path:
    """Makes a copy below `folder`, which `python` below takes for a checkout."""
    ignored = shutil.ignore_patterns("__pycache__", *([] if library else ["*.so"]))
    shutil.copytree(PACKAGE, folder / "fa4_ext", ignore=ignored)
    (folder / "version.txt").write_text(fa4_ext.__version__ + "\n")
    return folder / "fa4_ext"


def preamble(*folders: Path) -> str:
    """Returns code that puts folders first in Python's path: before the current one, which may be a
    checkout."""
    return f"import sys; sys.path[:0] = {[str(folder) for folder in folders]!r}\n"


def command(
    *arguments: str, folders: tuple[Path, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs python -m fa4_ext of the first package in `folders`."""
    code = (
        f"sys.argv = {['fa4_ext', *arguments]!r}; import runpy; runpy.run_module('fa4_ext', "
        "run_name='__main__', alter_sys=True)"
    )
    return python("-c", preamble(*folders) + code, **environment)
