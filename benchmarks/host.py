"""Host time of a call: how long Python and C++ take to enqueue it, the device being idle or behind."""

from __future__ import annotations

import statistics
import sys
import time

import torch

from benchmarks.contenders import Contender
from benchmarks.grids import Shape
from kernels.progress import Progress

SHAPES = (Shape(1, 1, 128, 64, True), Shape(8, 16, 512, 128, False))
CALLS = 50  # a batch: the launches of no contender fill the queue, in which the host would wait for the device


def _work(contender: Contender, shape: Shape, direction: str):
    q, k, v, do = (
        torch.randn(shape.batch, shape.seqlen, shape.heads, shape.head_dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        for _ in range(4)
    )
    if direction == "forward":
        return lambda: contender.attention(q, k, v, shape.causal)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    return lambda: torch.autograd.grad(contender.attention(*leaves, shape.causal), leaves, do)


def _batch_us(work) -> float:
    for _ in range(5):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        work()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / CALLS * 1e6


def measure(contenders: list[Contender], batches: int) -> list[dict]:
    """Rows of median microseconds a call, contenders alternating from batch to batch."""
    rows = []
    progress = Progress(2 * len(SHAPES), what="host times")
    for shape in SHAPES:
        for direction in ("forward", "forward+backward"):
            name = f"B{shape.batch} H{shape.heads} S{shape.seqlen} D{shape.head_dim} {direction}"
            progress.started(name)
            works, times = {}, {}
            for contender in contenders:
                if direction == "forward" or contender.has_backward:
                    works[contender.name] = (contender, _work(contender, shape, direction))
            for batch in range(batches):
                order = list(works.items())
                shift = batch % max(1, len(order))
                for who, (contender, work) in order[shift:] + order[:shift]:
                    try:
                        with contender.enabled():
                            times.setdefault(who, []).append(_batch_us(work))
                    except Exception as error:  # of any kind: other packages raise their own
                        print(f"\n{who}, {name}: {error!r:.300}", file=sys.stderr)
                        del works[who]
            rows.append({"name": name, "us": {who: statistics.median(values) for who, values in times.items() if who in works}})
            progress.finished()
    return rows
