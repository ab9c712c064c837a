"""Measures our kernels beside PyTorch's flash attention, the stock kernel, where ours may lose.
tuning/fit_stock.py fits the planner's speed rules to these rows.

python -m tuning.stock --csv tuning/results/h200_stock.csv
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

import fa4_ext
from fa4_ext.bench.contenders import ours_enabled
from fa4_ext.bench.correctness import make_cu_seqlens
from fa4_ext.bench.shapes import DIRECTIONS, Shape
from fa4_ext.bench.timing import in_turns, prepare, sets_for, summary
from tuning import rows, stock_grid
from tuning.calls import agree, calls, fields_of, make_inputs

TARGET_MS = 1.0
ROUNDS = 5
MAX_DIFFERENCE = 3e-2  # between ours and stock's: norm of the difference over the norm
BUDGET_S = 260  # seconds of a run; the next one adds what is missing

Problem = tuple[Shape, str]  # shape, direction


def _kernel(p: Shape, direction: str, inputs: list[torch.Tensor]) -> str:
    """Returns which of our kernels runs a problem: forward, decode or backward. The mask does not
    affect this."""
    q, k, v, _ = inputs
    with ours_enabled():
        if p.layout == "varlen":
            options = dict(cu_seqlens_q=make_cu_seqlens(p), max_seqlen_q=p.longest)
        else:
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            options = dict(enable_gqa=True)
        return fa4_ext.explain(q, k, v, backward=direction == "backward", **options).kernel.split(
            "_"
        )[1]


def key(problem: Problem) -> dict[str, str]:
    """Returns the columns that identify a problem in the file."""
    p, direction = problem
    return {name: str(value) for name, value in (fields_of(p) | {"direction": direction}).items()}


def missing(shapes: list[Shape], path: str | None) -> list[Problem]:
    """Returns the problems that a file lacks; all of them if there is no file."""
    every = [(p, direction) for p in shapes for direction in DIRECTIONS]
    there = rows.measured(path, key(every[0]))
    return [problem for problem in every if tuple(key(problem).values()) not in there]


def _name(problem: Problem) -> str:
    p, direction = problem
    return (
        f"{p.layout} {direction} b{p.batch} h{p.heads}/{p.heads_kv} q{p.seqlen_q} k{p.seqlen_k} "
        f"d{p.head_dim}"
    )


def _row(problem: Problem) -> dict:
    """Measures a problem. The row has its fields, direction, kernel, and microseconds of ours and
    stock."""
    p, direction = problem
    sets = [make_inputs(p, "bf16") for _ in range(sets_for(p.bytes))]
    providers = {"ours": ours_enabled, "stock": nullcontext}
    prepared, outputs = {}, []
    for name, enabled in providers.items():
        call = calls(p, sets, enabled)[direction]
        prepared[name] = prepare(call, len(sets), enabled, TARGET_MS)
        # The last call may have met another set of inputs, so both are compared on the first.
        with enabled():
            outputs.append(call(0)[: 1 if direction == "forward" else 3])
    agree(*outputs, MAX_DIFFERENCE)
    row = fields_of(p) | {"direction": direction, "kernel": _kernel(p, direction, sets[0])}
    for name, times in in_turns(prepared, ROUNDS).items():
        result = summary(times)
        row |= {
            f"{name}_us": round(result["ms"] * 1e3, 3),
            f"{name}_spread": round(result["spread"], 3),
        }
    return row


def print_table(found: list[dict]) -> None:
    """Prints the rows on which ours is slower, worst first."""
    slower = sorted(
        (row for row in found if row["ours_us"] > row["stock_us"]),
        key=lambda row: row["stock_us"] / row["ours_us"],
    )
    print(f"{len(slower)} of {len(found)} rows are slower than stock; the worst:")
    for row in slower[:40]:
        mask = "causal" if row["causal"] else "full"
        print(
            f"  {row['layout']:6} {row['direction']:8} {mask:6} B{row['batch']:<5} "
            f"H{row['heads']}/{row['heads_kv']:<3} "
            f"q{row['seqlen_q']:<5} k{row['seqlen_k']:<6} d{row['head_dim']:<4} "
            f"ours {row['ours_us']:9.1f} us  stock {row['stock_us']:9.1f} us  "
            f"{row['ours_us'] / row['stock_us']:.2f}x"
        )


def main() -> None:
    parser = rows.parser(__doc__, BUDGET_S)
    parser.add_argument("--quick", action="store_true", help="a part of the problems")
    arguments = parser.parse_args()
    problems = missing(stock_grid.problems(arguments.quick), arguments.csv)
    print_table(rows.run(arguments, problems, lambda problem: [_row(problem)], _name))


if __name__ == "__main__":
    main()
