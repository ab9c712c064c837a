"""This module checks what an administrator asks about the machine, torch and the build."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

from fa4_ext import (
    _dispatcher,
    _doctor_calls,
    _doctor_kernel,
    _environment,
    _info,
    _library,
    _register,
)
from fa4_ext._environment import Facts

OK, NOTE, WRONG = "ok", "note", "wrong"

_PACKAGE = Path(__file__).resolve().parent
_SETTINGS = (
    "FA4_EXT_AUTOLOAD",
    "FA4_EXT_AUTOREGISTER",
    "FA4_EXT_DISABLE",
    "FA4_EXT_PROVIDES",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED",
)
_SELFTEST = "`python -m fa4_ext selftest` runs every kernel and says which ones to leave out."
# A call that F.scaled_dot_product_attention takes to one of them gets to our overrides.
_OVERRIDDEN = (SDPBackend.FLASH_ATTENTION.value, SDPBackend.CUDNN_ATTENTION.value)


@dataclass(frozen=True)
class Check:
    name: str
    status: str  # OK, NOTE or WRONG
    sentence: str


@dataclass(frozen=True)
class Report:
    checks: list[Check]
    calls: list[_doctor_calls.Row]
    kernel: _doctor_kernel.KernelRun | None  # None where none was run

    @property
    def ok(self) -> bool:
        return all(check.status != WRONG for check in self.checks)


def examine(gpu: bool = True) -> Report:
    """Runs all checks. With `gpu=False` no GPU is required and none is touched."""
    facts, devices_failed = _facts(gpu)
    version, info = _info.version(), {} if _library.problem else _info.build_info()
    problem = (
        "not loaded, because torch is too old."
        if _environment.torch_too_old(facts.torch)
        else _library.problem
    )
    checks = [
        package(version, _PACKAGE),
        *distributions(version, _PACKAGE, installed()),
        library(problem, version, info),
        *platform(facts, gpu),
    ]
    if devices_failed:
        checks.append(devices_failed)
    elif facts.devices:
        names = [torch.cuda.get_device_name(index) for index in range(len(facts.devices))]
        checks += devices(names, facts.devices, info.get("archs", []))
    if _library.problem:
        return Report([*checks, *settings(os.environ)], [], None)
    handle = _register.options_in_force()
    checks += [
        registration(handle, {op: _dispatcher.entry(op) for op in _dispatcher.OPS}),
        sdpa(_backends(), handle, torch.backends.cuda.flash_sdp_enabled()),
        *settings(os.environ),
    ]
    usable = [index for index, capability in enumerate(facts.devices or ()) if _planned(capability)]
    run = None
    if usable:
        run, check = _kernel(usable[0])
        checks.append(check)
    capabilities = sorted(set(facts.devices or ())) or [
        found for found in ((9, 0), (10, 0)) if _planned(found)
    ]
    return Report(checks, _doctor_calls.rows(capabilities), run)


def _facts(gpu: bool) -> tuple[Facts, Check | None]:
    try:
        return _environment.gather(devices=gpu), None
    except RuntimeError as error:  # CUDA does not start
        return _environment.gather(), Check(
            "devices", WRONG, f"CUDA does not start: {_first_line(error)}."
        )


def _planned(capability: tuple[int, int]) -> bool:
    return _environment.ARCHS.get(capability) in _info.build_info()["archs"]


def package(version: str, folder: Path) -> Check:
    return Check("fa4_ext", OK, f"{version}, imported from {folder}.")


def installed() -> list[tuple[str, Path]]:
    """Returns the version and the folder of each distribution of fa4_ext that Python finds."""
    found: dict[tuple[str, Path], None] = {}
    for distribution in metadata.distributions(name="fa4_ext"):
        folder = Path(str(distribution.locate_file("fa4_ext"))).resolve()
        if folder.is_dir():  # not that of an editable install, whose package is elsewhere
            found.setdefault((distribution.version, folder))
    return list(found)


def distributions(version: str, folder: Path, found: list[tuple[str, Path]]) -> list[Check]:
    own = [other for other, where in found if where == folder]
    elsewhere = [(other, where) for other, where in found if where != folder]
    checks = []
    if len(own) > 1:
        sentence = (
            f"{folder} belongs to several installed versions, {', '.join(own)}: uninstall them all "
            "and install one."
        )
        checks.append(Check("distribution", WRONG, sentence))
    elif not own:
        checks.append(
            Check(
                "distribution",
                NOTE,
                "imported from a folder that no installed distribution owns, such as a checkout.",
            )
        )
    elif own != [version]:
        sentence = f"the package says {version}, its distribution {own[0]}: install fa4_ext anew."
        checks.append(Check("distribution", WRONG, sentence))
    for other, where in elsewhere:
        if _release(other) > _release(version):
            sentence = (
                f"{version} hides a newer one, {other} in {where}, which comes later in Python's "
                "path: uninstall the older one."
            )
            checks.append(Check("distribution", WRONG, sentence))
        else:
            sentence = (
                f"{other} is installed too, in {where}; it comes later in Python's path and is not "
                "used."
            )
            checks.append(Check("distribution", NOTE, sentence))
    return checks or [Check("distribution", OK, f"{version}, the only one installed.")]


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"^\d+(?:\.\d+)*", version)[0].split("."))


def library(problem: str | None, version: str, info: dict) -> Check:
    if problem:
        return Check("library", WRONG, problem)
    built = f"version {info.get('version', 'unknown')}, commit {info.get('commit', 'unknown')}"
    if info.get("version") != version:
        return Check(
            "library",
            WRONG,
            f"{built}, is not of this package, which is {version}: install fa4_ext anew.",
        )
    count, archs = len(_info.kernels()), " and ".join(f"sm{arch}" for arch in info["archs"])
    return Check(
        "library", OK, f"{built}: {count} kernels of the {info['subset']} subset for {archs}."
    )


def platform(facts: Facts, gpu: bool) -> list[Check]:
    """Checks torch, the driver, and whether there is a device. With `gpu=False`, what a machine
    without a GPU lacks is a note."""
    lacking = WRONG if gpu else NOTE
    found = []
    remarks = _environment.remarks(facts)
    if problem := _environment.torch_problem(facts):
        found.append(
            Check("torch", WRONG if _environment.torch_too_old(facts.torch) else lacking, problem)
        )
    else:
        sentence = f"{facts.torch}, built for CUDA {facts.torch_cuda}."
        found.append(Check("torch", NOTE, remarks[0]) if remarks else Check("torch", OK, sentence))
    if problem := _environment.driver_problem(facts):
        found.append(Check("driver", lacking, problem))
    elif facts.driver:
        found.append(
            Check("driver", OK, f"for CUDA {_environment.cuda_version(facts.driver)} and older.")
        )
    if facts.devices == ():
        found.append(Check("devices", WRONG, *_environment.device_problems(facts)))
    elif not gpu:
        found.append(Check("devices", NOTE, "not looked for."))
    return found


def devices(
    names: list[str], capabilities: tuple[tuple[int, int], ...], archs: list[int]
) -> list[Check]:
    """Checks what each GPU can run. A GPU that runs none of our kernels is wrong unless another GPU
    runs them; then it is a note."""
    lacking = (
        NOTE
        if any(_environment.ARCHS.get(capability) in archs for capability in capabilities)
        else WRONG
    )
    checks = []
    for index, (name, capability) in enumerate(zip(names, capabilities, strict=True)):
        described = f"{name}, compute capability {capability[0]}.{capability[1]}"
        if problem := _environment.device_problem(index, capability):
            checks.append(Check(f"GPU {index}", lacking, f"{name}: {problem}"))
        elif _environment.ARCHS[capability] not in archs:
            sentence = (
                f"{described}: this build has no kernels for it. Calls on it run PyTorch's own "
                "kernels."
            )
            checks.append(Check(f"GPU {index}", lacking, sentence))
        else:
            checks.append(Check(f"GPU {index}", OK, f"{described}: this build has kernels for it."))
    return checks


def registration(handle: _register.Handle | None, entries: dict[str, str]) -> Check:
    if handle is None:
        return Check(
            "registration",
            NOTE,
            "none; FA4_EXT_AUTOREGISTER=0 keeps `import fa4_ext` from registering.",
        )
    if _dispatcher.UNKNOWN in entries.values():
        return Check(
            "registration",
            NOTE,
            f"{handle!r}; this PyTorch does not show whether another provider is above it.",
        )
    if above := {op: entry for op, entry in entries.items() if not _dispatcher.is_ours(entry)}:
        others = ", ".join(f"aten::{op} goes to {entry}" for op, entry in above.items())
        return Check(
            "registration",
            WRONG,
            f"another provider is above fa4_ext: {others}. Registering again puts fa4_ext on top.",
        )
    return Check("registration", OK, f"{handle!r}, on top for all {len(entries)} ops.")


def _backends() -> list[int] | None:
    """Returns the backends in the order in which F.scaled_dot_product_attention tries them, or None
    if this torch does not tell."""
    tell = getattr(torch._C, "_get_sdp_priority_order", None)
    return tell() if tell else None


def sdpa(backends: list[int] | None, handle: _register.Handle | None, flash_enabled: bool) -> Check:
    """Says who gets the calls of F.scaled_dot_product_attention."""
    if not flash_enabled:
        return Check(
            "sdpa",
            WRONG,
            "flash attention is switched off, torch.backends.cuda.enable_flash_sdp(True) switches "
            "it on.",
        )
    if handle is None:
        return Check(
            "sdpa", NOTE, "F.scaled_dot_product_attention runs PyTorch's own kernels only."
        )
    if backends and backends[0] not in _OVERRIDDEN:
        known = {backend.value: name.lower() for name, backend in SDPBackend.__members__.items()}
        names = ", ".join(known.get(backend, str(backend)) for backend in backends)
        return Check(
            "sdpa",
            WRONG,
            f"F.scaled_dot_product_attention tries {names}: someone has set this order, in which "
            "these kernels do not come first.",
        )
    if not handle.prefer:
        return Check(
            "sdpa",
            NOTE,
            "F.scaled_dot_product_attention gets here where PyTorch takes it to flash attention; "
            "prefer=False leaves cuDNN its calls.",
        )
    return Check(
        "sdpa",
        OK,
        "F.scaled_dot_product_attention gets here where PyTorch takes it to flash attention or "
        "cuDNN.",
    )


def settings(environment) -> list[Check]:
    return [
        Check("environment", NOTE, f"{name}={environment[name]}")
        for name in _SETTINGS
        if name in environment
    ]


def _kernel(device: int) -> tuple[_doctor_kernel.KernelRun | None, Check]:
    try:
        run = _doctor_kernel.run(device)
    except RuntimeError as error:
        return None, Check(
            "kernel", WRONG, f"attention on GPU {device} failed: {_first_line(error)}. {_SELFTEST}"
        )
    return run, kernel(run)


def kernel(run: _doctor_kernel.KernelRun) -> Check:
    errors = ", ".join(f"{name} {error:.1e}" for name, error in run.errors.items())
    forward, backward = run.milliseconds
    advice = "" if run.right else f" {_SELFTEST}"
    return Check(
        "kernel",
        OK if run.right else WRONG,
        f"{run.kernels[0]} and {run.kernels[1]} on {run.device}: relative errors against fp32 "
        f"{errors}, at most {run.bound} is "
        f"right; first calls {forward:.1f} ms and {backward:.1f} ms; loading their modules took "
        f"{run.module_bytes / 2**20:.1f} MiB "
        f"of device memory.{advice}",
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
