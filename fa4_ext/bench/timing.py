"""Measures device time with CUDA events around replays of a CUDA graph. The contenders take turns.
Everything here runs on one side stream."""

from __future__ import annotations

import functools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

# The sets of inputs together are larger than any L2 of these devices. Inputs rotate among them, so
# that none is found there. Flushing instead would put a kernel between two calls, and into the time
# or into a graph of its own.
L2_BYTES = 128 << 20
MAX_CALLS = 64
# The device pauses between contenders: power, and with it the clock, evens out in milliseconds.
PAUSE_S = 0.02


@functools.cache
def stream() -> torch.cuda.Stream:
    """Returns the side stream on which all work runs. Graphs cannot be captured on the default
    stream, and a backward runs on its forward's stream."""
    return torch.cuda.Stream()


@functools.cache
def _pool():
    """Returns the memory pool that all graphs share, and a first graph that keeps the pool alive
    between problems."""
    pool = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin(pool=pool)
    torch.zeros(1, device="cuda")
    graph.capture_end()
    return pool, graph


@dataclass
class Prepared:
    """Work that is ready to be timed. `run()` enqueues `calls` calls."""

    run: Callable[[], Any]
    calls: int
    captured: bool
    outputs: Any  # of the last call, valid after a run
    call: Callable[[int], Any]  # owns tensors that a graph reads
    sleep_cycles: int = 0  # of the device while the host enqueues, if not captured

    def ms(self) -> float:
        """Runs the work once and returns its milliseconds per call."""
        return _event_ms(self.run, self.sleep_cycles) / self.calls


def sets_for(set_bytes: int) -> int:
    """Returns the number of sets of inputs to rotate among, so that none is found in L2."""
    return max(1, min(32, math.ceil(L2_BYTES / max(1, set_bytes))))


def prepare(
    call: Callable[[int], Any],
    sets: int,
    enabled: Callable[[], AbstractContextManager],
    target_ms: float,
) -> Prepared:
    """Prepares `call(i)`, which runs the problem on the i-th set of inputs. Captures the calls in a
    CUDA graph if possible; otherwise they are a loop that the host enqueues while a sleeping kernel
    holds the device."""
    with enabled():
        for i in range(2):
            call(i % sets)
        calls = max(
            sets,
            min(
                MAX_CALLS,
                math.ceil(target_ms / _event_ms(lambda: [call(i % sets) for i in range(3)]) * 3),
            ),
        )
        try:
            return _capture(call, sets, calls)
        except Exception as error:
            # Other packages raise errors of their own types.
            torch.cuda.synchronize()
            print(f"\nnot captured, timed as a loop: {error!r:.200}", file=sys.stderr)
    return _loop(call, sets, enabled, calls)


def _capture(call, sets: int, calls: int) -> Prepared:
    pool, _ = _pool()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin(pool=pool)
    try:
        for i in range(calls):
            outputs = call(i % sets)
    finally:
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    return Prepared(graph.replay, calls, True, outputs, call)


def _loop(call, sets: int, enabled, calls: int) -> Prepared:
    with enabled():
        start = time.perf_counter()
        outputs = call(0)
        host_seconds = time.perf_counter() - start
        torch.cuda.synchronize()

    def run():
        with enabled():
            for i in range(calls):
                call(i % sets)

    # The sleep counts 2 cycles a nanosecond. No clock here is faster.
    return Prepared(run, calls, False, outputs, call, int(2e9 * host_seconds * (calls + 2)))


def _event_ms(work: Callable[[], Any], sleep_cycles: int = 0) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if sleep_cycles:
        torch.cuda._sleep(sleep_cycles)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def in_turns(
    prepared: dict[str, Prepared], rounds: int, pause_s: float = PAUSE_S
) -> dict[str, list[float]]:
    """Returns milliseconds per call of every contender in every round. Each round has a new random
    order, because a contender that follows a power-hungry one meets lower clocks."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(rounds):
        for name in order.sample(list(prepared), len(prepared)):
            time.sleep(pause_s)
            times[name].append(prepared[name].ms())
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Returns the median in milliseconds, and the spread: slowest minus fastest round, as a
    fraction of the median."""
    median = statistics.median(times)
    return {"ms": median, "spread": (max(times) - min(times)) / median}
