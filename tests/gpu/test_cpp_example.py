"""The C++ programs of examples/cpp on a GPU. They check their results themselves, against fp32 math
and against eager."""

from __future__ import annotations

import pytest
import torch
from cpp_example import build_programs, export_package, run, tool


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    if missing := [name for name in ("cmake", "ninja", "c++") if tool(name) is None]:
        pytest.skip(f"building examples/cpp needs {', '.join(missing)}")
    return build_programs(tmp_path_factory.mktemp("cpp"))


def test_sdpa_runs_on_our_kernels(programs):
    output = run(programs / "sdpa")
    assert "Attention ran on fa4_ext's kernels" in output
    arch = {9: "sm90", 10: "sm100"}[torch.cuda.get_device_capability()[0]]
    ran = [
        line.split()[-1]
        for line in output.splitlines()
        if line.split()[0] in ("out", "dq", "dk", "dv")
    ]
    assert [kernel.split("_bf16_d128_")[0] for kernel in ran] == [
        f"{arch}_forward",
        *[f"{arch}_backward"] * 3,
    ]


def test_aoti_package_runs_on_our_kernels(programs, tmp_path):
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        pytest.skip("AOTInductor needs a CUDA toolkit to compile for a GPU")
    output = run(programs / "aoti", export_package(tmp_path / "attention.pt2"))
    assert "The package ran on fa4_ext's kernels" in output
