"""Runs `python -m fa4_ext selftest` with its options."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path

import torch

import fa4_ext
from fa4_ext import _cli_text, _environment, _library
from fa4_ext.bench.progress import Progress
from fa4_ext.selftest import report
from fa4_ext.selftest.problems import CALLED, Kernel
from fa4_ext.selftest.supervisor import Limits, Outcome, supervise

NO_DEVICE = "this needs a GPU"
# With the first the user leaves kernels out, with the second cuDNN keeps its calls
# (csrc/aten/cudnn_ops.cpp).
_NOT_FOR_A_CHILD = ("FA4_EXT_DISABLE", "TORCH_CUDNN_SDPA_AVOID_RECOMPILE")


def run(arguments) -> int:
    """Runs the command and returns its exit status: 0 where every kernel is right, 1 where one is
    not.

    Raises:
        ValueError: there is no GPU for it, or an option's value is wrong.
    """
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise ValueError(
            f"argument --json: {arguments.json} could not be written: there is no such folder"
        )
    kernels = _library.manifest()
    patterns = arguments.kernels.replace(",", " ").split() if arguments.kernels else ["*"]
    device, arch = find_device(_facts(), arguments.arch)
    selected = select(kernels, arch, patterns)
    found = test(kernels, selected, device, Limits(kernel=arguments.timeout))
    if arguments.json:
        Path(arguments.json).write_text(_cli_text.json_text(report.as_json(found)) + "\n")
    print(report.text(found))
    return 0 if found.ok else 1


def _facts() -> _environment.Facts:
    try:
        return _environment.gather(devices=True)
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"{NO_DEVICE}: CUDA does not start: {first_line}") from error


def find_device(facts: _environment.Facts, wanted: int | None) -> tuple[int, int]:
    """Returns the index of the first GPU that runs kernels of this build, and their `arch`.

    Args:
        facts: of this process, with its devices.
        wanted: 90, or 100 for compute capability 10.0 and 10.3; None for any.

    Raises:
        ValueError: there is none.
    """
    archs = fa4_ext.build_info()["archs"]
    for index, capability in enumerate(facts.devices or ()):
        arch = _environment.ARCHS.get(capability)
        if arch is not None and arch in archs and wanted in (None, arch):
            return index, arch
    if problems := _environment.problems(facts):
        raise ValueError(f"{NO_DEVICE}: {' Also, '.join(problems)}")
    raise ValueError(
        f"{NO_DEVICE} of {' or '.join(f'sm{arch}' for arch in archs)}"
        + (f", and of sm{wanted}" if wanted else "")
        + ", for which this build has kernels: none is there"
    )


def select(kernels: Sequence[Kernel], arch: int, patterns: Sequence[str]) -> list[Kernel]:
    """Returns the kernels of an architecture whose names match one of the patterns, but for those
    that no call of this build launches.

    Raises:
        ValueError: a pattern matches none of them.
    """
    launched = {name for kernel in kernels for name in kernel["companions"]}
    candidates = [
        kernel
        for kernel in kernels
        if kernel["arch"] == arch and (kernel["op"] in CALLED or kernel["name"] in launched)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(kernel["name"], pattern) for kernel in candidates):
            raise ValueError(
                f"argument --kernels: {pattern!r} matches no kernel for sm{arch} of this build, "
                f"which `python -m fa4_ext kernels --arch sm{arch}` lists"
            )
    return [
        kernel
        for kernel in candidates
        if any(fnmatchcase(kernel["name"], pattern) for pattern in patterns)
    ]


def test(
    kernels: Sequence[Kernel], selected: Sequence[Kernel], device: int, limits: Limits
) -> report.Report:
    """Runs the selected kernels and shows on standard error how far that is."""
    begin = time.monotonic()
    outcomes = run_all(child_command(device), report.to_call(selected, kernels), limits)
    seconds = round(time.monotonic() - begin, 1)
    return report.Report(
        {**facts_of(device), "seconds": seconds},
        report.with_companions(outcomes, selected, kernels),
        {kernel["name"]: kernel["op"] for kernel in selected},
    )


def child_command(device: int) -> list[str]:
    return [sys.executable, "-m", "fa4_ext.selftest.child", str(device)]


def facts_of(device: int) -> dict:
    return {
        "device": torch.cuda.get_device_name(device),
        "compute_capability": torch.cuda.get_device_capability(device),
        "driver": _driver(device),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "build": fa4_ext.build_info(),
    }


def run_all(command: Sequence[str], names: Sequence[str], limits: Limits) -> list[Outcome]:
    progress = Progress(len(names), "kernels", sys.stderr)
    outcomes = []
    with closing(supervise(command, names, limits, environment())) as running:
        for name in names:
            progress.started(name)
            outcomes.append(next(running))
            progress.finished()
    return outcomes


def environment() -> dict[str, str]:
    """Returns the environment of a child: it finds this package, and nothing but the self-test
    decides which kernels are registered."""
    variables = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_A_CHILD}
    package = str(Path(fa4_ext.__file__).resolve().parents[1])
    path = os.pathsep.join([package, *filter(None, [variables.get("PYTHONPATH")])])
    return variables | {"FA4_EXT_AUTOREGISTER": "0", "PYTHONPATH": path}


def _driver(device: int) -> str | None:
    """Returns the driver's version that nvidia-smi reports, or None."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i"]
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        done = subprocess.run([*query, uuid], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
