"""Measures ours against a peer where ours may lose; the planner's speed rules are fitted to these
rows. The peer, PyTorch's flash attention or cuDNN, owns the op that was called and gets the call
back where it is faster.

python -m tuning.stock --peer flash --csv tuning/results/h200_stock.csv
python -m tuning.stock --peer cudnn --csv tuning/results/h200_cudnn.csv
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

import fa4_ext
from fa4_ext.bench.contenders import ours_enabled
from fa4_ext.bench.shapes import DIRECTIONS, Shape
from fa4_ext.bench.timing import in_turns, prepare, sets_for, summary
from tuning import calls, cudnn_calls, cudnn_grid, rows, stock_grid

TARGET_MS = 1.0
ROUNDS = 5
# Runs of a millisecond leave the device cool enough.
PAUSE_S = 0.005
MAX_DIFFERENCE = 3e-2  # between ours and stock's: norm of the difference over the norm
BUDGET_S = 260  # seconds of a run; the next one adds what is missing

Problem = tuple[Shape, str]  # shape, direction


@dataclass(frozen=True)
class Peer:
    """Who ours is measured against.

    Attributes:
        name: its column in the file.
        problems: given --quick, returns the problems.
        make_inputs: given a shape and a dtype, makes q, k, v and dO.
        calls: given a shape, sets of inputs and a context that a forward may need, returns the
            directions as functions of a set's index.
        enabled: a context in which these functions run on the peer.
        ours: a context in which they run on our kernels, or raise.
        explain: explains the call of a shape and its inputs.
    """

    name: str
    problems: Callable[[bool], list[Problem]]
    make_inputs: Callable[[Shape, str], list[torch.Tensor]]
    calls: Callable[[Shape, list, Callable], dict]
    enabled: Callable[[], AbstractContextManager]
    ours: Callable[[], AbstractContextManager]
    explain: Callable[..., fa4_ext.Explanation]


def _flash_problems(quick: bool) -> list[Problem]:
    return [(p, direction) for p in stock_grid.problems(quick) for direction in DIRECTIONS]


PEERS = {
    "flash": Peer(
        "stock",
        _flash_problems,
        calls.make_inputs,
        calls.calls,
        nullcontext,
        ours_enabled,
        calls.explain,
    ),
    "cudnn": Peer(
        "cudnn",
        cudnn_grid.problems,
        cudnn_calls.make_inputs,
        cudnn_calls.calls,
        cudnn_calls.cudnn_enabled,
        cudnn_calls.ours_enabled,
        cudnn_calls.explain,
    ),
}


def _kernel(p: Shape, direction: str, inputs: list[torch.Tensor], peer: Peer) -> str:
    """Returns which of our kernels runs a problem: forward, decode or backward."""
    with peer.ours():
        found = peer.explain(p, inputs, backward=direction == "backward")
    if not found.kernel:
        raise RuntimeError(found.reason)
    return found.kernel.split("_")[1]


def key(problem: Problem) -> dict[str, str]:
    """Returns the columns that identify a problem in the file."""
    p, direction = problem
    fields = calls.fields_of(p) | {"direction": direction}
    if isinstance(p, cudnn_grid.Call):
        fields["head_dim_v"] = p.head_dim_v
    return {name: str(value) for name, value in fields.items()}


def missing(every: list[Problem], path: str | None) -> list[Problem]:
    """Returns the problems that a file lacks; all of them if there is no file."""
    there = rows.measured(path, key(every[0]))
    return [problem for problem in every if tuple(key(problem).values()) not in there]


def _name(problem: Problem) -> str:
    p, direction = problem
    return (
        f"{p.layout} {direction} b{p.batch} h{p.heads}/{p.heads_kv} q{p.seqlen_q} k{p.seqlen_k} "
        f"d{p.head_dim} {'causal' if p.causal else 'full'}"
    )


def _row(problem: Problem, peer: Peer) -> dict:
    """Measures a problem. The row has its fields, direction, kernel, and microseconds of ours and
    the peer's."""
    p, direction = problem
    sets = [peer.make_inputs(p, "bf16") for _ in range(sets_for(p.bytes))]
    row = key(problem) | {"kernel": _kernel(p, direction, sets[0], peer)}
    providers = {"ours": peer.ours, peer.name: peer.enabled}
    prepared, outputs = {}, []
    for name, enabled in providers.items():
        call = peer.calls(p, sets, enabled)[direction]
        prepared[name] = prepare(call, len(sets), enabled, TARGET_MS)
        # The last call may have met another set of inputs, so both are compared on the first.
        with enabled():
            outputs.append(call(0)[: 1 if direction == "forward" else 3])
    calls.agree(*outputs, MAX_DIFFERENCE)
    for name, times in in_turns(prepared, ROUNDS, PAUSE_S).items():
        result = summary(times)
        row |= {
            f"{name}_us": round(result["ms"] * 1e3, 3),
            f"{name}_spread": round(result["spread"], 3),
        }
    return row


def print_table(found: list[dict], peer: Peer) -> None:
    """Prints the rows on which ours is slower, worst first."""

    def ratio(row: dict) -> float:
        return row["ours_us"] / row[f"{peer.name}_us"]

    slower = sorted((row for row in found if ratio(row) > 1), key=ratio, reverse=True)
    print(f"{len(slower)} of {len(found)} rows are slower than {peer.name}; the worst:")
    for row in slower[:40]:
        mask = "causal" if row["causal"] == "True" else "full"
        print(
            f"  {row['layout']:6} {row['direction']:8} {mask:6} B{row['batch']:<5} "
            f"H{row['heads']}/{row['heads_kv']:<3} "
            f"q{row['seqlen_q']:<5} k{row['seqlen_k']:<6} d{row['head_dim']:<4} "
            f"ours {row['ours_us']:9.1f} us  {peer.name} {row[f'{peer.name}_us']:9.1f} us  "
            f"{ratio(row):.2f}x"
        )


def main() -> None:
    parser = rows.parser(__doc__, BUDGET_S)
    parser.add_argument("--peer", choices=PEERS, default="flash", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a part of the problems")
    arguments = parser.parse_args()
    peer = PEERS[arguments.peer]
    problems = missing(peer.problems(arguments.quick), arguments.csv)
    print_table(rows.run(arguments, problems, lambda problem: [_row(problem, peer)], _name), peer)
    if arguments.csv:
        print(f"{len(missing(peer.problems(arguments.quick), arguments.csv))} problems are left")


if __name__ == "__main__":
    main()
