"""Measures the host time of a call: how long Python and C++ take to enqueue it while the device is
idle or behind. It also counts the call's nodes in a CUDA graph."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable

import torch

from fa4_ext.bench.contenders import Contender
from fa4_ext.bench.correctness import make_inputs
from fa4_ext.bench.progress import Progress
from fa4_ext.bench.shapes import Shape, square
from fa4_ext.bench.throughput import attention_of

SHAPES = (
    square(1, 1, 128, 64, True, name="B1 H1 S128 D64"),
    square(8, 16, 512, 128, False, name="B8 H16 S512 D128"),
)
DIRECTIONS = ("forward", "forward+backward")
# Calls per batch. They are so few that no contender's launches fill the queue, and the host never
# waits for the device.
CALLS = 50
BATCHES, QUICK_BATCHES = 40, 10


def _work(contender: Contender, shape: Shape, direction: str, dtype: str) -> Callable[[], object]:
    q, k, v, do = make_inputs(shape, dtype)
    attention = attention_of(contender, shape)
    if direction == "forward":
        return lambda: attention(q, k, v)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, do)


def _batch_us(work: Callable[[], object]) -> float:
    for _ in range(5):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        work()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / CALLS * 1e6


def _graph_nodes(work: Callable[[], object]) -> int:
    """Returns the number of graph nodes of a call that has run before."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    torch.cuda.synchronize()
    graph.capture_begin()
    try:
        work()
    finally:
        graph.capture_end()
    count = ctypes.c_size_t()
    failed = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(
        ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)
    )
    if failed:
        raise RuntimeError(f"cuGraphGetNodes failed with error {failed}")
    return count.value


def _alternating(
    works: dict[str, tuple[Contender, Callable]], batches: int, name: str
) -> dict[str, float]:
    """Returns each contender's median microseconds per call. Each batch begins with the next
    contender; a contender that fails is left out."""
    times: dict[str, list[float]] = {}
    for batch in range(batches):
        order = list(works)
        shift = batch % max(1, len(order))
        for who in order[shift:] + order[:shift]:
            contender, work = works[who]
            try:
                with contender.enabled():
                    times.setdefault(who, []).append(_batch_us(work))
            except Exception as error:
                # Other packages raise errors of their own types.
                print(f"\n{who}, {name}: {error!r:.300}", file=sys.stderr)
                del works[who]
    return {who: statistics.median(values) for who, values in times.items() if who in works}


def _nodes(works: dict[str, tuple[Contender, Callable]], name: str) -> dict[str, int]:
    """Returns each contender's number of graph nodes, without the contenders that cannot be
    captured."""
    found = {}
    for who, (contender, work) in works.items():
        try:
            with contender.enabled():
                found[who] = _graph_nodes(work)
        except Exception as error:
            # Other packages raise errors of their own types.
            print(f"\n{who}, {name}, in a graph: {error!r:.300}", file=sys.stderr)
            torch.cuda.synchronize()
    return found


def measure(contenders: list[Contender], dtype: str, batches: int) -> list[dict]:
    """Returns a row for each call, with each contender's median microseconds and graph nodes."""
    rows = []
    progress = Progress(len(SHAPES) * len(DIRECTIONS), what="host times")
    for shape in SHAPES:
        for direction in DIRECTIONS:
            name = f"{shape.name} {direction}"
            progress.started(name)
            needed = "backward" if "backward" in direction else "forward"
            able = [contender for contender in contenders if contender.has(shape, dtype, needed)]
            works = {
                contender.name: (contender, _work(contender, shape, direction, dtype))
                for contender in able
            }
            rows.append(
                {
                    "name": name,
                    "us": _alternating(works, batches, name),
                    "graph_nodes": _nodes(works, name),
                }
            )
            progress.finished()
    return rows
