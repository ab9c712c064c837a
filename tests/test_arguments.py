"""The C++ side passes every kernel the number of arguments that kernels/arguments.py declares: all
kernels that a build can hold are launched behind a driver that runs nothing."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import fake_device
import pytest
from built import DIRECTORY

from kernels import table
from kernels.arguments import declared
from kernels.kernel import MAPS, Kernel, Op
from kernels.matrix import companions, with_candidates

ROOT = Path(__file__).parents[1]
KERNELS = with_candidates()
ENTRIES = dict(load="load", load_to_device="load_to_device", launch="launch")


def number(kernel: Kernel) -> int:
    return sum(argument.given for argument in declared(kernel))


def outcomes(driver: Path, folder: Path, wrong: dict[Kernel, int]) -> dict[str, str]:
    """Returns what the launch of each kernel threw, or "". The table says the `wrong` number of
    arguments of some. "endless" is a list that gets arguments until it throws."""
    source = table.cpp([table.Built(kernel, ENTRIES) for kernel in KERNELS], "{}", "[]")
    for kernel, count in wrong.items():
        row = re.compile(rf'(\{{"{kernel.name}",[^}}]* launch, )\d+\}}')
        source, found = row.subn(rf"\g<1>{count}}}", source)
        assert found == 1, f"{found} rows of {kernel.name}"
    (folder / "kernel_table.cpp").write_text(source)
    program = folder / "launches"
    subprocess.run(
        [
            *("c++", "-std=c++17", "-I", ROOT / "csrc/core", "-I", fake_device.cuda_headers()),
            *("-o", program, fake_device.FOLDER / "launches.cpp", folder / "kernel_table.cpp"),
            *(DIRECTORY.parent / "cmake/libfa4_core_static.a", "-ldl"),
        ],
        check=True,
    )
    done = subprocess.run(
        [program],
        capture_output=True,
        text=True,
        env=os.environ | {"LD_PRELOAD": str(driver)},
        check=True,
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("difference", (-1, 1))
def test_every_launch_passes_what_its_entry_takes_and_another_number_is_refused(
    driver, tmp_path, difference
):
    fp16 = [kernel for kernel in KERNELS if kernel.dtype == "fp16"]
    wrong = {next(k for k in fp16 if k.op is op): difference for op in Op}
    wrong = {kernel: number(kernel) + difference for kernel in wrong}
    errors = {
        kernel.name: f"kernel {kernel.name} takes {count} arguments, is given {number(kernel)}"
        for kernel, count in wrong.items()
    }
    found = outcomes(driver, tmp_path, wrong)
    assert found.pop("endless") == (
        f"kernel {KERNELS[0].name} takes {number(KERNELS[0])} arguments, is given 20 or more"
    )
    launched_only = (Op.BACKWARD_QUERIES, *MAPS, Op.PREPROCESS, Op.POSTPROCESS)
    called = [k for k in KERNELS if k.op not in launched_only]
    assert list(found) == [kernel.name for kernel in called]
    for kernel in called:
        first, *then, map_queries, map_keys = companions(kernel)
        launched = [k for k in (map_queries, map_keys, first, kernel, *then) if k]
        expected = next((errors[k.name] for k in launched if k.name in errors), "")
        assert found[kernel.name] == expected, kernel.name
