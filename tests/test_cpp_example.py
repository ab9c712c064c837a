"""Checks C++ without Python: the header, find_package(fa4_ext), and the programs of examples/cpp
where no GPU is in sight."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fa4_ext
from fa4_ext._dispatcher import OPS

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

from cpp_example import build_programs, configure, export_package, run

PACKAGE = Path(fa4_ext.__file__).parent
NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}

FIND = """
cmake_minimum_required(VERSION 3.22)
project(find LANGUAGES CXX)
find_package(fa4_ext {version} CONFIG REQUIRED)
find_package(fa4_ext CONFIG REQUIRED)
get_target_property(library fa4_ext::fa4_ext IMPORTED_LOCATION)
get_target_property(include fa4_ext::fa4_ext INTERFACE_INCLUDE_DIRECTORIES)
message(STATUS "found ${{fa4_ext_VERSION}}|${{library}}|${{include}}|")
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return build_programs(tmp_path_factory.mktemp("cpp"))


def registrations(output: str) -> list[dict[str, str]]:
    """Returns, for every heading of sdpa's output, who registered the CUDA kernel of each op."""
    parts = re.split(r"^(?:Before|After) .*$", output, flags=re.MULTILINE)[1:]
    return [dict(re.findall(r"^  (aten::\S+)  (.+)$", part, flags=re.MULTILINE)) for part in parts]


def test_sdpa_program_registers_and_removes(programs):
    output = run(programs / "sdpa", **NO_GPU)
    before, registered, removed = registrations(output)
    assert set(registered.values()) == {"fa4_ext:0"}, registered
    since_2_11 = {f"aten::{op}" for op in OPS if not op.endswith("_no_dropout_inplace")}
    assert registered.keys() == since_2_11
    assert before == removed and "fa4_ext:0" not in before.values()
    assert "Attention was not run: no CUDA device is available" in output
    assert re.findall(r"^  (sm90_\w+?)_bf16_d128_dense_causal_", output, flags=re.MULTILINE) == [
        "sm90_forward",
        "sm90_backward",
    ]


def test_aoti_program_runs_a_package(programs, tmp_path):
    output = run(programs / "aoti", export_package(tmp_path / "attention.pt2", **NO_GPU), **NO_GPU)
    assert "The package ran on PyTorch's kernels: no CUDA device is available" in output


def test_aoti_program_without_a_package_says_what_it_takes(programs):
    done = subprocess.run([programs / "aoti"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("aoti: usage: aoti PACKAGE")


@pytest.mark.parametrize("options", [("c", "-std=c99"), ("c++", "-std=c++17")], ids=["c", "c++"])
def test_header_compiles_alone(tmp_path, options):
    language, standard = options
    program = tmp_path / "program"
    program.write_text(
        "#include <fa4_ext.h>\nint main(void) { return fa4_ext_register() + (fa4_ext_last_error() "
        "!= 0); }\n"
    )
    run(
        "c++",
        "-x",
        language,
        standard,
        "-pedantic-errors",
        "-Wall",
        "-Werror",
        "-fsyntax-only",
        f"-I{PACKAGE / 'include'}",
        program,
    )


def test_package_is_found_wherever_it_lies_in_its_version(tmp_path):
    package = tmp_path / "some where" / "fa4_ext"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "CMakeLists.txt").write_text(FIND.format(version=fa4_ext.__version__))
    output = configure(tmp_path, tmp_path / "build", prefix=str(package / "cmake"))
    assert (
        f"found {fa4_ext.__version__}|{package / 'libfa4_ext.so'}|{package / 'include'}|" in output
    )


def test_another_version_is_not_found(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(FIND.format(version="99.0"))
    with pytest.raises(AssertionError, match=r'compatible with requested\s+version "99.0"'):
        configure(tmp_path, tmp_path / "build")


def test_missing_torch_says_how_to_name_it(tmp_path):
    with pytest.raises(AssertionError, match=r"TORCH_DIR is '', which has no include/ATen/ATen.h"):
        configure(Path(__file__).parents[1] / "examples" / "cpp", tmp_path)
