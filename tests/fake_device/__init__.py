"""Compiles device.c and runs scripts behind it."""

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "device.c"


def cuda_headers() -> Path:
    return next(
        Path(folder) / "nvidia/cu13/include"
        for folder in sys.path
        if (Path(folder) / "nvidia/cu13/include").is_dir()
    )


def compiled(directory: Path) -> Path:
    path = directory / "libcuda.so.1"
    options = "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", cuda_headers()
    subprocess.run(["cc", *options, SOURCE, "-o", path], check=True)
    return path


def printed(
    driver: Path,
    script: Path,
    *arguments,
    imported: tuple[Path, ...],
    asked: str = "",
    timeout: int,
) -> list:
    """Returns the JSON in each line that the script prints behind the driver. `imported` lists
    folders for PYTHONPATH."""
    folders = os.pathsep.join(map(str, imported))
    environment = os.environ | {
        "LD_PRELOAD": str(driver),
        "FA4_EXT_AUTOREGISTER": "0",
        "PYTHONPATH": folders,
    }
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(
        command, input=asked, capture_output=True, text=True, env=environment, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def reported(driver: Path, script: str, *arguments) -> list[dict]:
    """Returns what a script of this folder prints about the library of the checkout."""
    return printed(driver, FOLDER / script, *arguments, imported=(FOLDER.parents[1],), timeout=120)
