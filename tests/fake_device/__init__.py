"""device.c, compiled, and what a process behind it needs."""

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "device.c"


def compiled(directory: Path) -> Path:
    path = directory / "libcuda.so.1"
    include = next(Path(folder) / "nvidia/cu13/include" for folder in sys.path if (Path(folder) / "nvidia/cu13/include").is_dir())
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", include, SOURCE, "-o", path], check=True)
    return path


def environment(driver: Path, *imported: Path) -> dict[str, str]:
    """`imported`: folders for PYTHONPATH."""
    folders = os.pathsep.join(map(str, imported))
    return os.environ | {"LD_PRELOAD": str(driver), "FA4_EXT_AUTOREGISTER": "0", "PYTHONPATH": folders}
