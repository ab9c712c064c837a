"""Measures whole models with fa4_ext and without: step time, GPU time, who computes attention, and
the error against fp32 over that of PyTorch's math in the same precision.

python -m benchmarks.clients --json benchmarks/results/h200_clients.json
python -m benchmarks.clients --only "llama, packed" "gpt-oss prefill"

Needs transformers. Every contender has a process of its own, and they take turns, in a random order
for each workload. A workload's results are saved once it ends, and the file keeps those of
workloads that a run leaves out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
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
from fa4_ext.selftest import supervisor

LIMIT_S = 300  # for a workload, and for a process to start


class ContenderProcess:
    """The process of a contender, which is started again after a failure."""

    def __init__(self, contender: str, folder: Path, options: list[str]):
        self.command = [
            sys.executable, "-m", "benchmarks.clients.child", contender, f"--folder={folder}",
            *options,
        ]  # fmt: skip
        # PyTorch finds a compiled graph by the program, whichever backend its attention is for.
        cache = folder / f"compiled_{contender}"
        self.environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        self.child: supervisor.Child | None = None

    def start(self) -> None:
        """Waits until the process has imported all it needs.

        Raises:
            HungError, DiedError: it did not start.
        """
        self.child = supervisor.Child(self.command, self.environment, LIMIT_S)

    def stop(self) -> None:
        if self.child:
            self.child.kill()
        self.child = None

    def run(self, workload: str) -> dict:
        """Returns what the process answers, or why it did not, as `failed`."""
        try:
            if self.child is None:
                self.start()
            assert self.child
            return self.child.ask(workload, LIMIT_S)
        except (supervisor.HungError, supervisor.DiedError) as error:
            self.stop()
            return {"failed": str(error)}


def start_all(processes: Iterable[ContenderProcess]) -> None:
    """Starts the processes at once. One that does not start is tried again when it has work."""

    def start(process: ContenderProcess) -> None:
        with contextlib.suppress(supervisor.HungError, supervisor.DiedError):
            process.start()

    with ThreadPoolExecutor() as pool:
        list(pool.map(start, processes))


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
    progress = Progress(len(wanted), what="runs")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes = {}
        for contender in dict.fromkeys(one for _, one in wanted):
            processes[contender] = ContenderProcess(contender, Path(folder), options)
            stack.callback(processes[contender].stop)
        start_all(processes.values())
        for name, of_workload in groupby(wanted, key=lambda task: task[0]):
            results = {}
            for _, contender in of_workload:
                progress.started(f"{name}, {contender}")
                results[contender] = processes[contender].run(name)
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
