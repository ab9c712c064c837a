"""The library keeps to torch's stable ABI, and to what manylinux_2_28 has."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import fa4_ext

ROOT = Path(__file__).parent.parent
LIBRARY = Path(fa4_ext.__file__).with_name("libfa4_ext.so")
OLDEST_TORCH = (2, 11)


def test_torch_abi_audit_calls_the_library_stable():
    program = Path(sysconfig.get_path("scripts"), "torch-abi-audit")
    done = subprocess.run([program, "--json", LIBRARY], capture_output=True, text=True, check=True)
    (library,) = json.loads(done.stdout)["bundled_libs"]
    found = library["torch"]
    assert found["stable"], found["unstable_symbols"]
    assert tuple(map(int, found["min_torch_version"].split(".")))[:2] <= OLDEST_TORCH, found["version_defining_symbols"]


def test_library_needs_no_newer_symbols_than_manylinux_has():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "check_symbols.py", LIBRARY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
