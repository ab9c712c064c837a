"""Calls of plain F.scaled_dot_product_attention that our kernels do not cover, with fa4_ext
registered and without it.

python -m benchmarks.uncovered --json benchmarks/results/h200_uncovered.json

Such a call passes to the op that PyTorch chose, and should take the same time in both states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.command import json_path
from benchmarks.states import STATES, chosen_backend, compare, prepare_in_each
from fa4_ext.bench.progress import Progress
from fa4_ext.bench.results import save
from fa4_ext.bench.session import header, session
from fa4_ext.bench.timing import PAUSE_S, sets_for

TARGET_MS = 4.0
ROUNDS = 11
NOISE = 0.02  # A ratio within it of 1 counts as equal.
BATCH, HEADS, SEQLEN = 4, 16, 2048


def _float_mask() -> torch.Tensor:
    return torch.randn(SEQLEN, SEQLEN, dtype=torch.bfloat16, device="cuda")


# Each call has a name, and a head dim, a dtype and arguments.
CALLS = {
    "covered, for comparison": (128, torch.bfloat16, {}),
    "dropout_p=0.1": (128, torch.bfloat16, {"dropout_p": 0.1}),
    "dropout_p=0.1, causal, head dim 64": (
        64,
        torch.bfloat16,
        {"dropout_p": 0.1, "is_causal": True},
    ),
    "float attn_mask, dropout_p=0.1": (
        128,
        torch.bfloat16,
        {"attn_mask": _float_mask, "dropout_p": 0.1},
    ),
    "float32": (128, torch.float32, {}),
    "float32, causal, head dim 64": (64, torch.float32, {"is_causal": True}),
}


def measure(rounds: int) -> list[dict]:
    """Returns a row for each call and direction, with the backend and the median microseconds in
    each state, and the ratio of the latter."""
    rows = []
    progress = Progress(len(CALLS), what="calls")
    for name, (head_dim, dtype, given) in CALLS.items():
        progress.started(name)
        arguments = {key: value() if callable(value) else value for key, value in given.items()}
        size = (BATCH, SEQLEN, HEADS, head_dim)
        nbytes = 3 * BATCH * SEQLEN * HEADS * head_dim * dtype.itemsize
        sets = [
            [
                torch.randn(size, dtype=dtype, device="cuda").transpose(1, 2).requires_grad_()
                for _ in range(3)
            ]
            for _ in range(sets_for(nbytes))
        ]

        def forward(i, sets=sets, arguments=arguments):
            with torch.no_grad():
                return F.scaled_dot_product_attention(*sets[i], **arguments)

        def both(i, sets=sets, arguments=arguments):
            out = F.scaled_dot_product_attention(*sets[i], **arguments)
            return torch.autograd.grad(out, sets[i], out.detach())

        for direction, call in (("forward", forward), ("forward+backward", both)):
            row = {"call": name, "direction": direction}
            for state, enabled in STATES.items():
                with enabled():
                    row[f"{state}_backend"] = chosen_backend(*sets[0], **arguments)
            row |= compare(prepare_in_each(call, len(sets), TARGET_MS), rounds, PAUSE_S)
            rows.append(row)
        progress.finished()
    return rows


def report(rows: list[dict]) -> str:
    """Returns the rows as a table of Markdown, and which of the uncovered calls take another time
    while registered."""
    lines = [
        f"B{BATCH} H{HEADS} S{SEQLEN}, microseconds\n",
        "| call | direction | without fa4_ext | registered | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        times = (f"{row[f'{state}_us']:.0f} ({row[f'{state}_backend']})" for state in STATES)
        lines.append(
            f"| {row['call']} | {row['direction']} | {' | '.join(times)} | {row['ratio']:.3f} |"
        )
    uncovered = [row for row in rows if not row["call"].startswith("covered")]
    apart = [row for row in uncovered if abs(row["ratio"] - 1) > NOISE]
    lines.append(f"\n{len(apart)} of {len(uncovered)} differ by more than {NOISE:.0%}")
    lines += [f"  {row['call']}, {row['direction']}: {row['ratio']:.3f}" for row in apart]
    return "\n".join(lines)


def main() -> None:
    path = json_path(__doc__)
    with session():
        result = {"header": header(ROUNDS, "bf16", []), "rows": measure(ROUNDS)}
    print(report(result["rows"]))
    if path:
        save(result, path)


if __name__ == "__main__":
    main()
