"""This module is the command `python -m fa4_ext status`."""

from __future__ import annotations

import argparse
import os

import torch

import fa4_ext
from fa4_ext import _cli_text, _dispatcher, _environment, _library, _register

_JSON = """--json prints an object:
  version        of this package
  torch          its version
  devices        a list; of each: name, compute_capability, such as [9, 0]
  build          what the library was built from, as fa4_ext.build_info(); null where it
                 can't be loaded, like kernels
  kernels        how many there are
  registration   the import's own: active, and register()'s options; null where there
                 is none
  dispatcher     of each op that a registration overrides, what PyTorch calls on CUDA tensors
  problems       what keeps the kernels from running, in sentences
"""


def add_to(commands) -> None:
    parser = commands.add_parser(
        "status",
        help="what is registered, on which device, in which versions",
        description="Says what is registered, on which device, in which versions.",
        epilog=_JSON,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, described below")
    parser.set_defaults(run=_run, needs_no_library=True)


def _run(arguments) -> None:
    found = report()
    print(_cli_text.json_text(found) if arguments.json else text(found))


def report() -> dict:
    facts = _environment.gather(devices=True)
    handle, loaded = fa4_ext.default_handle, not _library.problem
    return {
        "version": fa4_ext.__version__,
        "torch": facts.torch,
        "devices": [
            {"name": torch.cuda.get_device_name(index), "compute_capability": capability}
            for index, capability in enumerate(facts.devices or ())
        ],
        "build": fa4_ext.build_info() if loaded else None,
        "kernels": len(fa4_ext.kernels()) if loaded else None,
        "registration": handle
        and {name: getattr(handle, name) for name in ("active", *_register.OPTIONS)},
        "dispatcher": {f"aten::{op}": _dispatcher.entry(op) for op in _dispatcher.OPS},
        "problems": list(
            dict.fromkeys(filter(None, [_library.problem, *_environment.problems(facts)]))
        ),
    }


def text(found: dict) -> str:
    rows = [("fa4_ext", found["version"]), ("torch", found["torch"])]
    rows += [
        (
            "device",
            "{name}, compute capability {compute_capability[0]}.{compute_capability[1]}".format_map(
                device
            ),
        )
        for device in found["devices"]
    ] or [("device", "no CUDA device is available")]
    if build := found["build"]:
        archs = " and ".join(f"sm{arch}" for arch in build["archs"])
        rows += [
            ("library", f"version {build['version']}, commit {build['commit']}"),
            ("kernels", f"{found['kernels']} of the {build['subset']} subset for {archs}"),
            (
                "sources",
                ", ".join(f"{name} {version}" for name, version in build["versions"].items()),
            ),
            ("manifest", f"sha256 {build['manifest_sha256']}"),
            ("registration", _registration(found["registration"])),
        ]
    width = max(map(len, found["dispatcher"]))
    rows += [("dispatcher", f"{op:{width}}  {entry}") for op, entry in found["dispatcher"].items()]
    rows += [("problem", problem) for problem in found["problems"]]
    return "\n".join(_cli_text.labelled(rows))


def _registration(options: dict | None) -> str:
    if options is None:
        return f"none, FA4_EXT_AUTOREGISTER is {os.environ.get('FA4_EXT_AUTOREGISTER', 'unset')}"
    active = "active" if options["active"] else "removed"
    return " ".join([active, *(f"{name}={options[name]!r}" for name in _register.OPTIONS)])
