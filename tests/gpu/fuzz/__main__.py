"""The long run: python tests/gpu/fuzz --count 20000 --seed 1 --json fuzz.json"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

sys.path.pop(0)  # this folder, or the checkout with its own fa4_ext
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the helpers of the GPU tests
# the checkout's fa4_ext; an installed one comes first
sys.path.append(str(Path(__file__).resolve().parents[3]))

import torch

import fa4_ext
from fa4_ext.bench.progress import Progress
from fuzz.case import parse
from fuzz.engine import Engine
from fuzz.generate import cases
from fuzz.runner import run_cases


@contextmanager
def _stderr_set_aside():
    """Yields the real standard error. PyTorch before 2.13 prints there what its kernels raise below
    ours, a lot here."""
    real = os.dup(2)
    with tempfile.TemporaryFile() as aside, os.fdopen(real, "w") as stream:
        os.dup2(aside.fileno(), 2)
        try:
            yield stream
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/gpu/fuzz", description="Checks random calls. Exit status 1: one failed."
    )
    parser.add_argument("--count", type=int, default=20_000, help="cases to run")
    parser.add_argument(
        "--seed", type=int, default=int.from_bytes(os.urandom(4), "little"), help="of the cases"
    )
    parser.add_argument(
        "--case",
        type=parse,
        help="run this case alone: the constructor's call that a failure printed",
    )
    parser.add_argument("--json", type=Path, help="write counts and failures there")
    options = parser.parse_args()
    if fa4_ext.default_handle:
        fa4_ext.default_handle.remove()
    chosen, count = (
        ([options.case], 1) if options.case else (cases(options.seed, options.count), options.count)
    )
    with _stderr_set_aside() as stream:
        report = run_cases(options.seed, chosen, Engine(), Progress(count, "cases", stream))
    print(report.text())
    if options.json:
        device = torch.cuda.get_device_name()
        about = {"device": device, "torch": torch.__version__, "fa4_ext": fa4_ext.build_info()}
        options.json.write_text(json.dumps(about | report.json(), indent=1) + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
