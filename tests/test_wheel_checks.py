"""The gates of `make wheel` notice what they are for."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import check_symbols
import check_wheel

NAME = "fa4_ext-0.1.0-py3-none-manylinux_2_28_x86_64.whl"
INFO = "fa4_ext-0.1.0.dist-info"
CONTENT = {
    **dict.fromkeys(check_wheel.PACKAGE, ""), "fa4_ext/_library.py": "", f"{INFO}/RECORD": "",
    f"{INFO}/METADATA": "Name: fa4_ext\nRequires-Dist: torch>=2.11\n", f"{INFO}/licenses/LICENSE": "",
    f"{INFO}/licenses/THIRD_PARTY_NOTICES.md": "",
}  # fmt: skip


def wheel(folder: Path, content: dict[str, str], name: str = NAME) -> Path:
    with zipfile.ZipFile(folder / name, "w") as file:
        for path, text in content.items():
            file.writestr(path, text)
    return folder / name


def test_a_wheel_as_it_should_be_passes(tmp_path):
    assert check_wheel.problems(wheel(tmp_path, CONTENT)) == []


@pytest.mark.parametrize(
    ("change", "name", "problem"),
    [
        ({"kernels/matrix.py": ""}, NAME, "kernels/matrix.py does not belong in it"),
        ({"fa4_ext/include/internal.h": ""}, NAME, "fa4_ext/include/internal.h does not belong in it"),
        ({"fa4_ext/libfa4_ext.so": None}, NAME, "fa4_ext/libfa4_ext.so is missing"),
        ({"fa4_ext/include/fa4_ext.h": None}, NAME, "fa4_ext/include/fa4_ext.h is missing"),
        ({"fa4_ext/cmake/fa4_ext-config.cmake": None}, NAME, "fa4_ext/cmake/fa4_ext-config.cmake is missing"),
        ({f"{INFO}/licenses/LICENSE": None}, NAME, "LICENSE is missing"),
        ({f"{INFO}/METADATA": "Requires-Dist: torch>=2.11\nRequires-Dist: numpy\n"}, NAME, "expected torch>=2.11 alone"),
        ({}, "fa4_ext-0.1.0-py3-none-linux_x86_64.whl", "not tagged"),
    ],
    ids=["extra", "extra_header", "no_library", "no_header", "no_cmake", "no_licence", "requirement", "tag"],
)
def test_a_wheel_that_is_not_is_refused(tmp_path, change, name, problem):
    content = {path: text for path, text in (CONTENT | change).items() if text is not None}
    assert any(problem in found for found in check_wheel.problems(wheel(tmp_path, content, name)))


def test_symbols_beyond_the_platform_and_the_interface_are_named():
    symbols = (
        "0000000000000000      DF *UND*\t0000000000000000 (GLIBC_2.34) pthread_once\n"
        "0000000000000000      DF *UND*\t0000000000000000 (GLIBC_2.14) memcpy\n"
        "0000000000012340 g    DF .text\t0000000000000040  Base        fa4_ext_register\n"
        "0000000000012380 g    DF .text\t0000000000000040  Base        _mlir_something\n"
    )
    assert check_symbols.offending_versions(symbols) == ["pthread_once needs GLIBC_2.34; manylinux_2_28 has GLIBC_2.28"]
    assert check_symbols.offending_exports(symbols) == ["_mlir_something is exported; allowed: fa4_ext_*"]
