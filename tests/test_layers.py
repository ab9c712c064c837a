"""The layers know each other in one direction, and the check that says so works."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = [sys.executable, str(ROOT / "scripts" / "tools" / "check_layers.py")]


def test_layers_are_kept():
    assert subprocess.run([*CHECK, str(ROOT)], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        (
            "csrc/core/plan/plan.cpp",
            "#include <torch/csrc/stable/tensor.h>",
            "csrc/core knows no torch",
        ),
        (
            "csrc/core/plan/plan.cpp",
            '#include "../../aten/tensors.h"',
            "csrc/core does not know its callers",
        ),
        ("csrc/core/plan/plan.cpp", "#include <cuda.h>", "csrc/core/plan knows no CUDA"),
        (
            "csrc/core/plan/plan.cpp",
            '#include "../launch/module.h"',
            "csrc/core/plan does not know what launches its plans",
        ),
        ("csrc/core/error.h", '#include "plan/plan.h"', "what both rooms of csrc/core share"),
        ("csrc/aten/forward.cpp", "#include <ATen/ATen.h>", "stable ABI"),
        (
            "csrc/aten/forward.cpp",
            'run("sm90_forward_bf16_d64");',
            "kernels are chosen in csrc/core/plan",
        ),
        ("csrc/core/plan/plan.cpp", 'getenv("FA4");', "the environment is read in Python"),
        ("csrc/aten/options.cpp", "std::getenv(name);", "the environment is read in Python"),
        ("fa4_ext/__init__.py", "from kernels import matrix", "the wheel ships no compiler"),
    ],
)
def test_a_violation_is_named(tmp_path, file, line, reason):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"// first\n{line}\n")
    result = subprocess.run([*CHECK, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 1
    assert f"{file}:2: " in result.stderr and reason in result.stderr


def test_a_variable_of_torchs_may_be_read(tmp_path):
    path = tmp_path / "csrc" / "aten" / "cudnn_ops.cpp"
    path.parent.mkdir(parents=True)
    path.write_text('std::getenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE");\n')
    result = subprocess.run([*CHECK, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
