"""This module is the command `python -m fa4_ext kernels`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import fa4_ext
from fa4_ext import _cli_text, _cli_values, _environment, _info

_JSON = """--json prints an object:
  kernels            a list, in the order of the text; of each kernel:
    name
    arch                 90, or 100 for compute capability 10.0 and 10.3
    op, dtype
    head_dim             the largest that it serves, of query and key
    head_dim_v           the largest that it serves, of value
    registers            per thread
    spill_bytes          per thread
    shared_memory_bytes  per CTA
    object_bytes
  count              of the list
  object_bytes       of all in the list
"""


def add_to(commands) -> None:
    parser = commands.add_parser(
        "kernels",
        help="list the compiled kernels",
        description="Lists the compiled kernels, or those of them that the options name.",
        epilog=_JSON,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch", type=arch, metavar="sm90", help="only kernels for this GPU: sm90, sm100 or sm103"
    )
    parser.add_argument(
        "--op",
        help="forward, decode, backward, backward_groups, backward_queries, backward_keys, "
        "preprocess, postprocess or clear",
    )
    parser.add_argument("--dtype", help="bf16 or fp16")
    parser.add_argument(
        "--head-dim",
        type=_cli_values.count,
        metavar="128",
        help="only kernels whose largest head dim of query and key this is",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, described below")
    parser.set_defaults(run=_run, needs_no_library=False)


def arch(text: str) -> int:
    major, minor = _cli_values.capability(text)
    return _environment.ARCHS.get((major, minor), 10 * major + minor)


def _run(arguments) -> None:
    wanted = {name: getattr(arguments, name) for name in ("arch", "op", "dtype", "head_dim")}
    kernels = select(
        fa4_ext.kernels(), {name: value for name, value in wanted.items() if value is not None}
    )
    print(_cli_text.json_text(report(kernels)) if arguments.json else text(kernels))


def select(kernels: Sequence[_info.KernelInfo], wanted: dict) -> list[_info.KernelInfo]:
    """Returns the kernels that have every wanted value.

    Raises:
        ValueError: no kernel has one of the values.
    """
    for name, value in wanted.items():
        there = sorted({getattr(kernel, name) for kernel in kernels})
        if value not in there:
            option = "--" + name.replace("_", "-")
            served = next(
                (
                    f"; {size}'s serve {value}"
                    for size in there
                    if name == "head_dim" and size > value
                ),
                "",
            )
            raise ValueError(
                f"argument {option}: {value!r} is in no kernel of this build, which has "
                f"{', '.join(map(str, there))}{served}"
            )
    return [
        kernel
        for kernel in kernels
        if all(getattr(kernel, name) == value for name, value in wanted.items())
    ]


def report(kernels: Sequence[_info.KernelInfo]) -> dict:
    return {
        "kernels": [asdict(kernel) for kernel in kernels],
        "count": len(kernels),
        "object_bytes": sum(kernel.object_bytes for kernel in kernels),
    }


def text(kernels: Sequence[_info.KernelInfo]) -> str:
    width = max((len(kernel.name) for kernel in kernels), default=4)
    rows = [
        f"{k.name:{width}}  {k.registers:4}  {k.spill_bytes:5}  "
        f"{k.shared_memory_bytes / 1024:5.1f}  {k.object_bytes / 1024:6.1f}"
        for k in kernels
    ]
    size = _cli_text.readable_bytes(sum(kernel.object_bytes for kernel in kernels))
    total = (
        f"{len(kernels)} kernels, {size} of objects. regs and spill (bytes) are a thread's, smem "
        "and object in KiB"
    )
    return "\n".join([f"{'name':{width}}  regs  spill   smem  object", *rows, total])
