"""A random sample of calls that our kernels cover, with fa4_ext registered and without it.

python -m benchmarks.default_choice --json benchmarks/results/h200_default_choice.json

Without fa4_ext, a call runs what PyTorch chooses by default. A ratio is the GPU time with fa4_ext
over that without. A run adds to the file the calls that it lacks, until the budget is spent.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from statistics import geometric_mean

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.nn.attention.varlen import varlen_attn
from torch.profiler import ProfilerActivity, profile

import fa4_ext
from benchmarks.random_calls import SDPA, Call, sample
from benchmarks.states import STATES, chosen_backend, compare, prepare_in_each
from fa4_ext.bench.correctness import DTYPES
from fa4_ext.bench.progress import Progress
from fa4_ext.bench.results import save
from fa4_ext.bench.session import NO_DEVICE, header, session
from fa4_ext.bench.timing import sets_for
from tuning.calls import agree

TARGET_MS = 1.0
ROUNDS = 7
# Runs of a millisecond leave the device cool enough.
PAUSE_S = 0.005
BUDGET_S = 200
# A call whose ratio is larger counts as slower. It is measured again, over more rounds and each
# time in other memory, because a few of 200 equal calls would be slower by chance: the time of a
# small kernel depends by up to 6% on where its tensors lie.
SLOWER = 1.02
ROUNDS_AGAIN, TIMES_AGAIN = 11, 3
WORST = 10
MAX_DIFFERENCE = 3e-2  # between the two: norm of the difference over the norm
# Torch 2.11 takes fewer key/value heads without being told; later versions ask for enable_gqa.
VARLEN_ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def make_inputs(call: Call) -> list[torch.Tensor]:
    """Makes q, k, v, which record gradients where the call has a backward, and dO."""
    of_q, of_k = (call.heads, call.seqlen_q), (call.heads_kv, call.seqlen_k)
    sizes = [(*of_q, call.head_dim), (*of_k, call.head_dim), (*of_k, call.head_dim_v),
             (*of_q, call.head_dim_v)]  # fmt: skip
    options = {"dtype": DTYPES[call.dtype], "device": "cuda"}
    if call.lengths:
        rows, _ = call.rows
        tensors = [torch.randn(rows, heads, dim, **options) for heads, _, dim in sizes]
    elif call.contiguous:
        tensors = [torch.randn(call.batch, *size, **options) for size in sizes]
    else:
        tensors = [
            torch.randn(call.batch, seqlen, heads, dim, **options).transpose(1, 2)
            for heads, seqlen, dim in sizes
        ]
    for tensor in tensors[:3]:
        tensor.requires_grad_(call.direction != "forward")
    return tensors


def attention_of(call: Call) -> Callable[..., torch.Tensor]:
    """Returns the call as a function of q, k and v."""
    grouped = call.heads != call.heads_kv
    if not call.lengths:
        return lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=call.causal, enable_gqa=grouped
        )
    cu_seqlens = torch.tensor([0, *accumulate(call.lengths)], dtype=torch.int32, device="cuda")
    options = {"enable_gqa": grouped} if VARLEN_ASKS_FOR_GQA else {}
    if call.causal:
        options["window_size"] = (-1, 0)
    longest = max(call.lengths)
    return lambda q, k, v: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)


def work_of(call: Call, sets: list[list[torch.Tensor]]) -> Callable[[int], tuple]:
    """Returns the work that is timed, as a function of a set's index. Its results are the output
    and, of a call with a backward, the gradients."""
    attention = attention_of(call)

    def forward(i):
        with torch.no_grad():
            return (attention(*sets[i][:3]),)

    def both(i):
        *qkv, do = sets[i]
        out = attention(*qkv)
        return (out.detach(), *torch.autograd.grad(out, qkv, do))

    return forward if call.direction == "forward" else both


def backend(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """Returns the backend that F.scaled_dot_product_attention chooses without fa4_ext; for
    varlen_attn, which chooses otherwise, the name of the function."""
    if call.entry != SDPA:
        return call.entry
    grouped = call.heads != call.heads_kv
    return chosen_backend(q, k, v, is_causal=call.causal, enable_gqa=grouped)


def _events(work: Callable[[], object], activity: ProfilerActivity) -> list:
    with profile(activities=[activity]) as profiler:
        work()
        torch.cuda.synchronize()
    return sorted(profiler.events(), key=lambda event: event.time_range.start)


def our_kernels(work: Callable[[], object]) -> list[str]:
    """Returns the names of our kernels that `work` runs, from their ranges in a profile."""
    known = {kernel.name for kernel in fa4_ext.kernels()}
    names = (event.name for event in _events(work, ProfilerActivity.CPU))
    return list(dict.fromkeys(name for name in names if name in known))


def cuda_kernels(work: Callable[[], object]) -> list[str]:
    """Returns the names of the kernels that some work runs, in order and shortened."""
    events = _events(work, ProfilerActivity.CUDA)
    names = (event.name[:100] for event in events if event.device_type == DeviceType.CUDA)
    return list(dict.fromkeys(names))


def make_sets(call: Call) -> list[list[torch.Tensor]]:
    return [make_inputs(call) for _ in range(max(2, sets_for(call.bytes)))]


def timed(work: Callable[[int], tuple], sets: int, rounds: int) -> dict:
    return compare(prepare_in_each(work, sets, TARGET_MS), rounds, PAUSE_S)


def measure(call: Call) -> dict:
    """Measures a call in both states. The row has its ratio, the median microseconds, the backend
    that PyTorch chooses without fa4_ext, our kernels that run with it and, of a slower call, all
    kernels in either state."""
    sets = make_sets(call)
    work = work_of(call, sets)
    row: dict = {"backend": backend(call, *sets[0][:3])}
    outputs = []
    for state, enabled in STATES.items():
        with enabled():
            outputs.append(work(0))
            if state == "registered":
                row["our_kernels"] = our_kernels(lambda: work(0))
    agree(*outputs, MAX_DIFFERENCE)
    row |= timed(work, len(sets), ROUNDS)
    if row["ratio"] > SLOWER:
        again = []
        for _ in range(TIMES_AGAIN):
            elsewhere = make_sets(call)  # while the first sets still hold their memory
            again.append(timed(work_of(call, elsewhere), len(elsewhere), ROUNDS_AGAIN))
        row |= sorted(again, key=lambda one: one["ratio"])[TIMES_AGAIN // 2]
    if row["ratio"] > SLOWER:
        row["kernels"] = {}
        for state, enabled in STATES.items():
            with enabled():
                row["kernels"][state] = cuda_kernels(lambda: work(0))
    return row


def report(rows: list[dict]) -> str:
    """Returns the summary: geometric means in all and by kind, how many calls are slower, and the
    worst with what ran them."""
    measured = [row for row in rows if "ratio" in row]
    failed = [row for row in rows if "error" in row]
    lines = [f"{len(measured)} calls were measured, {len(failed)} failed"]
    lines += [f"  {row['call']}: {row['error']}" for row in failed]
    if not measured:
        return "\n".join(lines)
    groups = {"all": measured}
    for row in measured:
        groups.setdefault(f"{row['kind']}, {row['direction']}", []).append(row)
    lines += ["", f"{'time with fa4_ext over without':36} calls  ours   mean  worst  > {SLOWER}"]
    for name, group in groups.items():
        ratios = [row["ratio"] for row in group]
        ours = sum(bool(row["our_kernels"]) for row in group)
        slower = sum(ratio > SLOWER for ratio in ratios)
        lines.append(
            f"{name:36} {len(group):5} {ours:5} {geometric_mean(ratios):6.3f} "
            f"{max(ratios):6.3f} {slower:7}"
        )
    lines += ["", f"the worst {min(WORST, len(measured))}:"]
    for row in sorted(measured, key=lambda row: row["ratio"], reverse=True)[:WORST]:
        ran = ", ".join(row["our_kernels"]) or "none of ours"
        lines += [
            f"{row['ratio']:.3f}  {row['call']}",
            f"       {row['without_us']:.1f} us without ({row['backend']}), "
            f"{row['registered_us']:.1f} us with: {ran}",
        ]
        lines += [
            f"       {state}: {', '.join(names)}" for state, names in row.get("kernels", {}).items()
        ]
    return "\n".join(lines)


def earlier_rows(path: str | None, seed: int, commit: str) -> list[dict]:
    """Returns the rows that a file has already; none if there is no file.

    Raises:
        ValueError: it holds another sample, or was measured with another build.
    """
    if not path or not os.path.exists(path):
        return []
    with open(path) as file:
        result = json.load(file)
    for what, there, wanted in (
        ("seed", result["seed"], seed),
        ("commit", result["header"]["build"]["commit"], commit),
    ):
        if there != wanted:
            raise ValueError(f"argument --json: {path} is of {what} {there}, this run of {wanted}")
    return result["rows"]


def _write(result: dict, path: str) -> None:
    """Replaces the file at once, so that a run that is ended leaves a whole one."""
    save(result, f"{path}.part")
    os.replace(f"{path}.part", path)


def run(calls: list[tuple[int, Call]], result: dict, path: str | None, budget_s: float) -> None:
    """Measures the numbered calls within the budget. Their rows are in the result, and in the file
    as soon as a call is done."""
    end = time.monotonic() + budget_s
    progress = Progress(len(calls), what="calls")
    for number, call in calls:
        if time.monotonic() > end:
            print(f"\nthe budget of {budget_s:.0f} s is spent", file=sys.stderr)
            return
        progress.started(str(call))
        row = {
            "number": number, "call": str(call), "kind": call.kind, "direction": call.direction
        }  # fmt: skip
        try:
            row |= measure(call)
        except RuntimeError as error:
            row["error"] = f"{error!r:.300}"
        result["rows"].append(row)
        if path:
            _write(result, path)
        progress.finished()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument(
        "--count", type=int, default=200, help="calls in the sample (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="PATH", help="measures the calls that the file lacks")
    parser.add_argument(
        "--budget", metavar="SECONDS", type=float, default=BUDGET_S, help="(default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error(f"argument --count: must be at least 1, is {arguments.count}")
    begin = time.monotonic()
    try:
        rows = earlier_rows(arguments.json, arguments.seed, fa4_ext.build_info()["commit"])
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    numbered = list(enumerate(sample(arguments.seed, arguments.count)))
    there = {row["number"] for row in rows}
    with session():
        result = {"header": header(ROUNDS, "bf16", []), "seed": arguments.seed, "rows": rows}
        left = arguments.budget - (time.monotonic() - begin)
        missing = [(number, call) for number, call in numbered if number not in there]
        run(missing, result, arguments.json, left)
    print(report(rows))


if __name__ == "__main__":
    main()
