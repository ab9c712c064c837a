"""Measures whole models with fa4_ext and without: step time, GPU time, who computes attention, and
the error against fp32 over that of PyTorch's math in the same precision.

python -m benchmarks.clients --json benchmarks/results/h200_clients.json
python -m benchmarks.clients --only "llama, packed" "gpt-oss prefill"

Needs transformers. Every contender runs in a process of its own, in a random order. A workload's
results are saved once it ends, and the file keeps those of workloads that a run leaves out.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.clients import report
from benchmarks.clients.child import REFERENCE
from benchmarks.clients.contenders import CONTENDERS
from benchmarks.clients.workloads import WORKLOADS
from fa4_ext.bench.progress import Progress
from fa4_ext.bench.results import save
from fa4_ext.bench.session import NO_DEVICE, header

STARTED_AT_ONCE = 6  # processes, of which one measures and the others import
LIMIT_S = 300  # for a process, without the time that it waits for others


def run(name: str, contender: str, folder: Path, options: list[str]) -> dict:
    """Returns what the process printed, or its last words as `failed`."""
    truth = folder / f"{list(WORKLOADS).index(name)}.pt"
    command = [
        sys.executable, "-m", "benchmarks.clients.child", name, contender, f"--truth={truth}",
        f"--lock={folder / 'lock'}", *options,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S * STARTED_AT_ONCE
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {LIMIT_S * STARTED_AT_ONCE} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()
        return {"failed": last[-1] if last else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def tasks(names: list[str], contenders: list[str], seed: int) -> list[tuple[str, str]]:
    """Returns workloads and contenders in order: each workload's reference before its contenders,
    which are shuffled."""
    draw, found = random.Random(seed), []
    for name in names:
        wanted = [one for one in WORKLOADS[name].contenders if one in contenders]
        draw.shuffle(wanted)
        found += [(name, one) for one in (REFERENCE, *wanted)]
    return found


def measure(
    names: list[str], contenders: list[str], seed: int, options: list[str]
) -> Iterator[tuple[str, dict]]:
    """Yields each workload as it ends, with its results by contender."""
    wanted = tasks(names, contenders, seed)
    progress = Progress(len(wanted), what="processes")
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(STARTED_AT_ONCE) as pool,
    ):
        begun = [
            (name, one, pool.submit(run, name, one, Path(folder), options)) for name, one in wanted
        ]
        for name, of_workload in groupby(begun, key=lambda task: task[0]):
            results = {}
            for _, contender, future in of_workload:
                progress.started(f"{name}, {contender}")
                results[contender] = future.result()
                progress.finished()
            if not results[REFERENCE]:
                del results[REFERENCE]  # it did not fail
            yield name, results


def kept(path: str | None) -> dict[str, dict]:
    """Returns the results that an earlier run left in the file."""
    if path is None or not Path(path).exists():
        return {}
    return json.loads(Path(path).read_text())["clients"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=WORKLOADS, default=[*WORKLOADS]
    )
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", choices=CONTENDERS, default=[*CONTENDERS]
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--figure", metavar="PATH")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    result = {"header": header(1, "bf16", []), "clients": kept(arguments.json)}
    for name, found in measure(arguments.only, arguments.contenders, arguments.seed, []):
        result["clients"][name] = found
        if arguments.json:
            save(result, arguments.json)
    print("\n".join(report.table(result["clients"])))
    if arguments.figure:
        report.draw(result, arguments.figure)


if __name__ == "__main__":
    main()
