"""Runs one workload for one contender, in a process of its own, or computes the reference.

python -m benchmarks.clients.child WORKLOAD CONTENDER --truth FILE --lock FILE

Prints a line of JSON. Many children may start at once: only the one that holds the lock touches the
GPU, so that the others import meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.clients.contenders import CONTENDERS, EAGER, MATH, SDPA
from benchmarks.clients.kernels import measured
from benchmarks.clients.workload import Place, Results, Workload
from benchmarks.clients.workloads import WORKLOADS

REFERENCE = "reference"  # in place of a contender
WARM_UP, STEPS = 3, 9
POLL_S = 0.2


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Holds the lock inside a `with` block."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    times = []
    for _ in range(STEPS):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("contender", choices=(REFERENCE, *CONTENDERS))
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    workload, truth = WORKLOADS[arguments.workload], arguments.truth
    place = Place(arguments.device, torch.bfloat16, arguments.tiny)
    if arguments.contender == REFERENCE:
        with alone(arguments.lock):
            partial = truth.with_suffix(".part")
            torch.save(reference(workload, place), partial)
            partial.rename(truth)
        return print(json.dumps({}))
    while not truth.exists():
        time.sleep(POLL_S)
    with alone(arguments.lock):
        result = measure(workload, arguments.contender, place, truth)
    return print(json.dumps(result))


if __name__ == "__main__":
    main()
