"""Ours against stock where ours may lose: the planner's speed rules are fitted to these rows.

python -m benchmarks.rules --csv benchmarks/results/h200_rules.csv
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch

import fa4_ext
from benchmarks import rows, rules_grid
from fa4_ext.bench.contenders import ours_enabled
from fa4_ext.bench.correctness import DTYPES, make_cu_seqlens
from fa4_ext.bench.session import NO_DEVICE, session
from fa4_ext.bench.shapes import DIRECTIONS, Shape
from fa4_ext.bench.timing import in_turns, prepare, sets_for, summary

TARGET_MS = 1.0
ROUNDS = 5
MAX_DIFFERENCE = 3e-2  # of ours and stock's: norm over norm
BUDGET_S = 260  # of a run; the next one adds what is missing
aten = torch.ops.aten

Problem = tuple[Shape, str]  # direction


def make_inputs(p: Shape, dtype: str) -> list[torch.Tensor]:
    """q, k, v, dO in the layout of `_flash_attention_forward`."""
    rows_q = (p.total_q,) if p.layout == "varlen" else (p.batch, p.seqlen_q)
    rows_k = rows_q if p.layout == "varlen" else (p.batch, p.seqlen_k)
    q = (*rows_q, p.heads, p.head_dim)
    k = (*rows_k, p.heads_kv, p.head_dim)
    return [torch.randn(size, dtype=DTYPES[dtype], device="cuda") for size in (q, k, k, q)]


def calls(p: Shape, sets: list, enabled):
    """The forward and the backward as functions of the index of a set; `enabled`: for the forward
    of which the backward is."""
    cu_seqlens = make_cu_seqlens(p)
    longest = (p.longest, p.longest) if p.layout == "varlen" else (p.seqlen_q, p.seqlen_k)

    def forward(i):
        q, k, v, _ = sets[i]
        return aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, *longest, 0.0, p.causal, False
        )

    with enabled():
        saved = [forward(i) for i in range(len(sets))]

    def backward(i):
        q, k, v, do = sets[i]
        out, lse, rng_state, unused, _ = saved[i]
        return aten._flash_attention_backward(
            do,
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens,
            cu_seqlens,
            *longest,
            0.0,
            p.causal,
            rng_state,
            unused,
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
        return fa4_ext.explain(q, k, v, backward=direction == "backward", **options).kernel.split(
            "_"
        )[1]


def agree(outputs, others, at_most: float) -> None:
    """Both are right or both are wrong; the test suite says which."""
    for a, b in zip(outputs, others, strict=True):
        difference = ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-3)).item()
        if not difference <= at_most:
            raise RuntimeError(
                f"outputs differ by {difference:.2e}, at most {at_most:.1e} is allowed"
            )


def fields_of(p: Shape) -> dict:
    """What a row says about its problem."""
    fields = (
        "layout",
        "batch",
        "heads",
        "heads_kv",
        "seqlen_q",
        "seqlen_k",
        "head_dim",
        "causal",
        "longest",
    )
    return {name: getattr(p, name) for name in fields} | {
        "uniform": len(set(p.lengths)) <= 1,
        "total_q": p.total_q,
    }


def key(problem: Problem) -> dict[str, str]:
    """What the file says about a problem."""
    p, direction = problem
    return {name: str(value) for name, value in (fields_of(p) | {"direction": direction}).items()}


def missing(shapes: list[Shape], path: str | None) -> list[Problem]:
    """What a file lacks; everything when there is none."""
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
    """Problem fields, direction, kernel, and microseconds of ours and stock."""
    p, direction = problem
    sets = [make_inputs(p, "bf16") for _ in range(sets_for(p.bytes))]
    providers = {"ours": ours_enabled, "stock": nullcontext}
    prepared, outputs = {}, []
    for name, enabled in providers.items():
        call = calls(p, sets, enabled)[direction]
        prepared[name] = prepare(call, len(sets), enabled, TARGET_MS)
        with enabled():  # the last call may have met another set of inputs: compare on the first
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
    """The rows on which ours is slower, worst first."""
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
    if not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    problems = missing(rules_grid.rules(arguments.quick), arguments.csv)
    with session():
        print_table(
            rows.measure(
                problems, lambda problem: [_row(problem)], _name, arguments.budget, arguments.csv
            )
        )


if __name__ == "__main__":
    main()
