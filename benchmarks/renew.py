"""Measures again what benchmarks/results has, each file by its own command in its own process.

python -m benchmarks.renew --into benchmarks/results
python -m benchmarks.renew --into benchmarks/results --limit 600 varlen memory

Files are named after the device. What the planner follows is measured by tuning/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from fa4_ext.bench.session import NO_DEVICE

BENCH = ("fa4_ext", "bench")
# The module and the options of each result, by the name of its file. flash-attn-4 compiles for long
# (FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 keeps what it compiled), and is left out where it was
# never close.
COMMANDS: dict[str, tuple[str, ...]] = {
    "paper": (*BENCH, "--host"),
    "paper_gqa": (
        *BENCH,
        "--grid",
        "paper-gqa",
        "--op",
        "forward",
        "--contenders",
        "ours,cudnn,fa3,fa4",
    ),
    "paper_gqa_backward": (
        *BENCH,
        "--grid",
        "paper-gqa",
        "--op",
        "backward",
        "--rounds",
        "5",
        "--contenders",
        "ours,stock,cudnn",
    ),
    "fp16": (*BENCH, "--op", "forward", "--dtype", "fp16", "--contenders", "ours,cudnn,fa4"),
    "varlen": (*BENCH, "--grid", "varlen", "--contenders", "ours,stock,fa4"),
    "dims": (*BENCH, "--grid", "dims"),
    "memory": ("benchmarks.memory",),
    "pages": ("benchmarks.pages",),
    "default_choice": ("benchmarks.default_choice", "--seed", "90210"),
    "decode": (*BENCH, "--grid", "decode", "--contenders", "ours,stock,cudnn"),
    "gqa": (*BENCH, "--grid", "gqa", "--contenders", "ours,stock,cudnn"),
    "vit": (*BENCH, "--grid", "vit", "--contenders", "ours,stock,cudnn"),
    "llama": (*BENCH, "--grid", "llama", "--contenders", "ours,stock,cudnn"),
    "masks": (*BENCH, "--grid", "masks", "--rounds", "5"),
    "startup": ("benchmarks.startup",),
    "uncovered": ("benchmarks.uncovered",),
    "clients": ("benchmarks.clients",),
}
WITH_FIGURE = (BENCH[0], "benchmarks.clients")  # the modules that draw one


def device() -> str:
    """Returns the device's name in file names: h200 for an NVIDIA H200."""
    return torch.cuda.get_device_name().split()[1].lower()


def command(name: str, into: Path, device: str) -> list[str]:
    """Adds the options that say where the result goes."""
    path = into / f"{device}_{name}"
    written = [f"--json={path}.json"]
    if COMMANDS[name][0] in WITH_FIGURE:
        written.append(f"--figure={path}.png")
    return [sys.executable, "-m", *COMMANDS[name], *written]


def renew(name: str, into: Path, limit_s: float) -> bool:
    """Runs the command. What it prints goes to a file beside its result."""
    with open(into / f"{device()}_{name}.log", "w") as log:
        try:
            return (
                subprocess.run(
                    command(name, into, device()), stdout=log, stderr=log, timeout=limit_s
                ).returncode
                == 0
            )
        except subprocess.TimeoutExpired:
            return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join(COMMANDS)}; all by default"
    )
    parser.add_argument(
        "--into",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="the folder of the results, and of a .log of each",
    )
    parser.add_argument(
        "--limit",
        metavar="SECONDS",
        type=float,
        default=300,
        help="the most that each may take (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in COMMANDS]:
        parser.error(f"{', '.join(unknown)}: must be one of {', '.join(COMMANDS)}")
    if not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    failed = []
    for name in arguments.names or COMMANDS:
        begin = time.monotonic()
        print(f"{name:10}", end=" ", flush=True)
        done = renew(name, arguments.into, arguments.limit)
        print(f"{time.monotonic() - begin:5.0f} s  {'done' if done else 'FAILED'}", flush=True)
        failed += [] if done else [name]
    if failed:
        sys.exit(f"failed, see their .log files in {arguments.into}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
