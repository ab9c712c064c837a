"""Ours against stock where ours may lose: the planner's speed rules are fitted to these rows.

python -m benchmarks.rules --csv benchmarks/results/h200_rules.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch

import fa4_ext
from benchmarks import rules_grid
from fa4_ext.bench.contenders import ours_enabled
from fa4_ext.bench.correctness import DTYPES, make_cu_seqlens
from fa4_ext.bench.progress import Progress
from fa4_ext.bench.session import NO_DEVICE, session
from fa4_ext.bench.shapes import DIRECTIONS, Shape
from fa4_ext.bench.timing import in_turns, prepare, sets_for, summary

TARGET_MS = 1.0
ROUNDS = 5
MAX_DIFFERENCE = 3e-2  # of ours and stock's: norm over norm
BUDGET_S = 260  # of a run; the next one adds what is missing
aten = torch.ops.aten
T = TypeVar("T")


def make_inputs(p: Shape, dtype: str) -> list[torch.Tensor]:
    """q, k, v, dO in the layout of `_flash_attention_forward`."""
    rows_q = (p.total_q,) if p.layout == "varlen" else (p.batch, p.seqlen_q)
    rows_k = rows_q if p.layout == "varlen" else (p.batch, p.seqlen_k)
    q = (*rows_q, p.heads, p.head_dim)
    k = (*rows_k, p.heads_kv, p.head_dim)
    return [torch.randn(size, dtype=DTYPES[dtype], device="cuda") for size in (q, k, k, q)]


def calls(p: Shape, sets: list, enabled):
    """The forward and the backward as functions of the index of a set; `enabled`: for the forward of which the backward is."""
    cu_seqlens = make_cu_seqlens(p)
    longest = (p.longest, p.longest) if p.layout == "varlen" else (p.seqlen_q, p.seqlen_k)

    def forward(i):
        q, k, v, _ = sets[i]
        return aten._flash_attention_forward(q, k, v, cu_seqlens, cu_seqlens, *longest, 0.0, p.causal, False)

    with enabled():
        saved = [forward(i) for i in range(len(sets))]

    def backward(i):
        q, k, v, do = sets[i]
        out, lse, rng_state, unused, _ = saved[i]
        return aten._flash_attention_backward(
            do, q, k, v, out, lse, cu_seqlens, cu_seqlens, *longest, 0.0, p.causal, rng_state, unused
        )

    return {"forward": forward, "backward": backward}


def _kernel(p: Shape, direction: str, inputs: list[torch.Tensor]) -> str:
    """Which of our kernels runs it: forward, decode or backward. The mask plays no part in that."""
    q, k, v, _ = inputs
    with ours_enabled():
        if p.layout == "varlen":
            options = dict(cu_seqlens_q=make_cu_seqlens(p), max_seqlen_q=p.longest)
        else:
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            options = dict(enable_gqa=True)
        return fa4_ext.explain(q, k, v, backward=direction == "backward", **options).kernel.split("_")[1]


def agree(outputs, others, at_most: float) -> None:
    """Both are right or both are wrong; the test suite says which."""
    for a, b in zip(outputs, others, strict=True):
        difference = ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-3)).item()
        if not difference <= at_most:
            raise RuntimeError(f"outputs differ by {difference:.2e}, at most {at_most:.1e} is allowed")


def fields_of(p: Shape) -> dict:
    """What a row says about its problem."""
    fields = ("layout", "batch", "heads", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "causal", "longest")
    return {name: getattr(p, name) for name in fields} | {"uniform": len(set(p.lengths)) <= 1, "total_q": p.total_q}


def within(budget_s: float, problems: Sequence[T], name: Callable[[T], str]) -> Iterator[T]:
    """The problems one after the other, with a progress bar, until the budget is spent."""
    end = time.monotonic() + budget_s
    progress = Progress(len(problems), what="problems")
    for problem in problems:
        if time.monotonic() > end:
            print(f"\nthe budget of {budget_s:.0f} s is spent", file=sys.stderr)
            return
        progress.started(name(problem))
        yield problem
        progress.finished()


def _name(problem: tuple[Shape, tuple[str, ...]]) -> str:
    p, _ = problem
    return f"{p.layout} b{p.batch} h{p.heads}/{p.heads_kv} q{p.seqlen_q} k{p.seqlen_k} d{p.head_dim}"


def measure(problems: list[tuple[Shape, tuple[str, ...]]], rounds: int, budget_s: float) -> list[dict]:
    """Rows of problem fields, direction and microseconds of ours and stock, until the budget is spent."""
    rows = []
    for p, directions in within(budget_s, problems, _name):
        sets = [make_inputs(p, "bf16") for _ in range(sets_for(p.bytes))]
        fields = fields_of(p)
        try:
            providers = {"ours": ours_enabled, "stock": nullcontext}
            runs = {name: calls(p, sets, enabled) for name, enabled in providers.items()}
            for direction in directions:
                prepared = {
                    name: prepare(runs[name][direction], len(sets), enabled, TARGET_MS) for name, enabled in providers.items()
                }
                # The last call may have met another set of inputs: compare on the first.
                outputs = []
                for name, enabled in providers.items():
                    with enabled():
                        outputs.append(runs[name][direction](0)[: 1 if direction == "forward" else 3])
                agree(*outputs, MAX_DIFFERENCE)
                row = fields | {"direction": direction, "kernel": _kernel(p, direction, sets[0])}
                for name, times in in_turns(prepared, rounds).items():
                    result = summary(times)
                    row |= {f"{name}_us": round(result["ms"] * 1e3, 3), f"{name}_spread": round(result["spread"], 3)}
                rows.append(row)
        except RuntimeError as error:
            print(f"\n{p.layout} {fields}: {error}", file=sys.stderr)
    return rows


def measured(path: str | None, names: Iterable[str]) -> set[tuple[str, ...]]:
    """What these columns of a file of write_csv say; nothing when there is no such file."""
    if not path or not os.path.exists(path):
        return set()
    names = tuple(names)
    with open(path, newline="") as file:
        return {tuple(line[name] for name in names) for line in csv.DictReader(file)}


def missing(problems: list[Shape], path: str | None) -> list[tuple[Shape, tuple[str, ...]]]:
    """The problems with the directions that a file of write_csv lacks of them; everything when there is no such file."""
    there = measured(path, (*fields_of(problems[0]), "direction"))
    left = [
        (p, tuple(direction for direction in DIRECTIONS if (*map(str, fields_of(p).values()), direction) not in there))
        for p in problems
    ]
    return [(p, directions) for p, directions in left if directions]


def write_csv(rows: list[dict], path: str) -> None:
    """Adds the rows, with the spread left out."""
    columns = [name for name in rows[0] if not name.endswith("_spread")]
    exists = os.path.exists(path)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if not exists:
            writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict]) -> None:
    """The rows on which ours is slower, worst first."""
    slower = sorted((row for row in rows if row["ours_us"] > row["stock_us"]), key=lambda row: row["stock_us"] / row["ours_us"])
    print(f"{len(slower)} of {len(rows)} rows are slower than stock; the worst:")
    for row in slower[:40]:
        mask = "causal" if row["causal"] else "full"
        print(
            f"  {row['layout']:6} {row['direction']:8} {mask:6} B{row['batch']:<5} H{row['heads']}/{row['heads_kv']:<3} "
            f"q{row['seqlen_q']:<5} k{row['seqlen_k']:<6} d{row['head_dim']:<4} "
            f"ours {row['ours_us']:9.1f} us  stock {row['stock_us']:9.1f} us  {row['ours_us'] / row['stock_us']:.2f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part of the problems")
    parser.add_argument("--csv", metavar="PATH", help="measures and adds what the file lacks")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    problems = missing(rules_grid.rules(arguments.quick), arguments.csv)
    with session():
        rows = measure(problems, ROUNDS, BUDGET_S)
    print_table(rows)
    if arguments.csv and rows:
        write_csv(rows, arguments.csv)


if __name__ == "__main__":
    main()
