"""Runs workloads for one contender, or computes the reference, in a process of its own.

python -m benchmarks.clients.child CONTENDER --folder FOLDER

Prints a line of JSON when it is ready, and one for each name of a workload that it reads from
standard input. The reference leaves its results in the folder, for the contenders to be compared
with.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.clients.contenders import CONTENDERS, EAGER, MATH, SDPA
from benchmarks.clients.kernels import measured
from benchmarks.clients.workload import Place, Results, Workload
from benchmarks.clients.workloads import WORKLOADS

REFERENCE = "reference"  # in place of a contender
WARM_UP = 2
STEPS, FEWEST_STEPS, STEPS_S = 9, 3, 1.0  # slow steps vary little


def truth_of(folder: Path, workload: Workload) -> Path:
    return folder / f"{list(WORKLOADS).index(workload.name)}.pt"


def errors(found: Results, truth: Results) -> dict[str, float]:
    """Returns each result's distance from the truth over the truth's length."""
    return {
        name: float((found[name].float() - exact).norm() / exact.norm())
        for name, exact in truth.items()
    }


def reference(workload: Workload, place: Place) -> dict:
    """Computes the truth, in fp32, and the errors of math in the place's dtype."""
    implementation = EAGER if workload.eager else SDPA
    exact = Place(place.device, torch.float32, place.tiny)
    # The efficient kernel computes fp32 as exactly as math, and in less memory.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        truth = workload.make(implementation, exact)()
    with MATH.enter():
        plain = workload.make(implementation, place)()
    return {
        "truth": {name: one.float() for name, one in truth.items()},
        "math": errors(plain, truth),
    }


def step_ms(step) -> float:
    """Returns the median time of a step, from before its first line to the end of its work."""
    times: list[float] = []
    while len(times) < FEWEST_STEPS or (len(times) < STEPS and sum(times) < 1e3 * STEPS_S):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure(workload: Workload, contender: str, place: Place, truth: Path) -> dict:
    """Returns what a contender's run gives: errors over math's, and on a GPU times."""
    chosen = CONTENDERS[contender]
    with chosen.enter():
        step = workload.make(chosen.implementation, place)
        for _ in range(WARM_UP if place.device == "cuda" else 0):
            step()
        found = step()
        result: dict = {}
        if place.device == "cuda":
            result["step_ms"] = step_ms(step)
            result["gpu_ms"], result["attention_ms"] = measured(step)
    kept = torch.load(truth, map_location=place.device)
    of_math = kept["math"]
    result["error_over_math"] = {
        name: error / max(of_math[name], torch.finfo(torch.float32).eps)
        for name, error in errors(found, kept["truth"]).items()
    }
    return result


def run(workload: Workload, contender: str, place: Place, folder: Path) -> dict:
    """Returns what the parent is told: nothing about a reference, why about a failure."""
    truth = truth_of(folder, workload)
    try:
        if contender == REFERENCE:
            torch.save(reference(workload, place), truth)
            return {}
        return measure(workload, contender, place, truth)
    except Exception as error:
        return {"failed": f"{error!r:.300}"}


def free() -> None:
    """Gives the memory of a workload back to the device, for the other processes."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=(REFERENCE, *CONTENDERS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    place = Place(arguments.device, torch.bfloat16, arguments.tiny)
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no answer
        print(json.dumps({}), file=answers, flush=True)
        for line in sys.stdin:
            workload = WORKLOADS[line.rstrip("\n")]
            result = run(workload, arguments.contender, place, arguments.folder)
            free()
            print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
