"""TFLOP/s of every contender over a grid of self-attention shapes; each is checked against fp32 before it is timed."""

from __future__ import annotations

import statistics
import sys

import torch

from benchmarks.contenders import Contender
from benchmarks.grids import Shape
from benchmarks.timing import Prepared, in_turns, prepare, sets_for, summary
from kernels.progress import Progress

TARGET_MS = 8.0  # of one timed run: long beside the launch of a graph
# Norm of the error over the norm of the truth. bf16 attention is at 2 to 6 in a thousand, a wrong mask or scale at 1 in 10.
MAX_RELATIVE_ERROR = 1.5e-2


def _inputs(shape: Shape) -> list[torch.Tensor]:
    """q, k, v, dO: [batch, heads, seqlen, head_dim] views of [batch, seqlen, heads, head_dim] memory, as models have them."""
    size = (shape.batch, shape.seqlen, shape.heads, shape.head_dim)
    return [torch.randn(size, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(4)]


def _truth(shape: Shape, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """out, dq, dk, dv of the last head of the last batch entry, fp32 math."""
    q, k, v, do = (t[-1, -1].float() for t in inputs)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    scores = q @ k.T * shape.head_dim**-0.5
    if shape.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    out = scores.softmax(-1) @ v
    return out.detach(), *torch.autograd.grad(out, (q, k, v), do)


def _check(who: str, outputs, truths) -> None:
    for output, truth in zip(outputs, truths, strict=True):
        error = ((output[-1, -1].float() - truth).norm() / truth.norm()).item()
        if not error <= MAX_RELATIVE_ERROR:
            raise RuntimeError(f"{who} is wrong: relative error {error:.2e}")


def _prepare(contender: Contender, shape: Shape, direction: str, sets: list, truth) -> Prepared:
    """Ready to be timed, and right. The backward alone is timed, on the graph that one forward has left."""
    if direction == "forward":

        def call(i):
            with torch.no_grad():
                return (contender.attention(*sets[i][:3], shape.causal),)
    else:
        graphs = []
        with contender.enabled():
            for *qkv, do in sets:
                leaves = [t.detach().requires_grad_() for t in qkv]
                graphs.append((contender.attention(*leaves, shape.causal), leaves, do))

        def call(i):
            out, leaves, do = graphs[i]
            return torch.autograd.grad(out, leaves, do, retain_graph=True)

    prepared = prepare(call, len(sets), contender.enabled, TARGET_MS)
    last = (prepared.calls - 1) % len(sets) if prepared.captured else 0
    _check(contender.name, prepared.outputs, (truth[last][:1] if direction == "forward" else truth[last][1:]))
    return prepared


def measure(contenders: list[Contender], shapes: list[Shape], rounds: int) -> list[dict]:
    """One row per shape and direction: the shape, and of each contender median ms, spread and TFLOP/s, or why there is none."""
    rows = []
    progress = Progress(2 * len(shapes), what="shapes")
    for shape in shapes:
        count = sets_for(3 * 2 * shape.batch * shape.heads * shape.seqlen * shape.head_dim)
        sets = [_inputs(shape) for _ in range(max(2, count))]
        truth = [_truth(shape, inputs) for inputs in sets]
        for direction in ("forward", "backward"):
            progress.started(f"{shape.name} {direction}")
            prepared, results = {}, {}
            for contender in contenders:
                if direction == "backward" and not contender.has_backward:
                    continue
                try:
                    prepared[contender.name] = _prepare(contender, shape, direction, sets, truth)
                except Exception as error:  # of any kind: other packages raise their own
                    print(f"\n{contender.name}, {shape.name} {direction}: {error}", file=sys.stderr)
                    results[contender.name] = {"error": f"{error!r:.300}"}
            measured = in_turns(prepared, rounds)
            for name, times in measured.items():
                result = summary(times)
                result["tflops"] = shape.flops(direction) / result["ms"] / 1e9
                result["captured"] = prepared[name].captured
                results[name] = result
            row = {"name": f"{shape.name} {direction}", "direction": direction, "results": results}
            rows.append(vars(shape) | row | {"speed_of_ours": speed_of_ours(measured)})
            progress.finished()
    return rows


def speed_of_ours(measured: dict[str, list[float]]) -> dict[str, float]:
    """Our speed over each other contender's: the median over the rounds, in each of which both met the same clocks."""
    ours = measured.get("ours", [])
    others = {name: times for name, times in measured.items() if name != "ours" and ours}
    return {name: statistics.median(b / a for a, b in zip(ours, times, strict=True)) for name, times in others.items()}


def matmul_ceiling(rounds: int) -> float:
    """TFLOP/s of an 8192^3 bf16 matrix product: what the device gives to a dense kernel in this process."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    prepared = prepare(lambda i: a @ b, 1, torch.no_grad, 20.0)
    return 2 * 8192**3 / summary(in_turns({"matmul": prepared}, rounds)["matmul"])["ms"] / 1e9
