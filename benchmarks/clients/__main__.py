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
import random
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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

LIMIT_S = 300  # for a workload


class Child:
    """The process of a contender, which is started again after a failure."""

    def __init__(self, contender: str, folder: Path, options: list[str]):
        self.contender, self.folder, self.options = contender, folder, options
        self.start()

    def start(self) -> None:
        self.errors = (self.folder / f"{self.contender}.log").open("a+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.clients.child", self.contender,
             f"--folder={self.folder}", *self.options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def run(self, workload: str) -> dict:
        """Returns what the process answers, or why it did not, as `failed`."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"{workload}\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], LIMIT_S)
            answer = self.process.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, answer = [True], ""
        if answer:
            return json.loads(answer)
        self.stop()
        last = (self.folder / f"{self.contender}.log").read_text().strip().splitlines()
        self.start()
        if not ready:
            return {"failed": f"took more than {LIMIT_S} s"}
        return {"failed": last[-1] if last else "the process ended"}


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
        children = {}
        for contender in dict.fromkeys(one for _, one in wanted):
            children[contender] = Child(contender, Path(folder), options)
            stack.callback(children[contender].stop)
        for name, of_workload in groupby(wanted, key=lambda task: task[0]):
            results = {}
            for _, contender in of_workload:
                progress.started(f"{name}, {contender}")
                results[contender] = children[contender].run(name)
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
