"""Measures calls of plain F.scaled_dot_product_attention that our kernels do not cover, before a
registration and under it.

python -m benchmarks.uncovered --json benchmarks/results/h200_uncovered.json

Under a registration PyTorch asks flash attention first. A call that flash attention takes and ours
does not runs PyTorch's flash kernel, also where cuDNN would have run it before. The rows show what
that costs.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import fa4_ext
from benchmarks.command import json_path
from fa4_ext.bench.progress import Progress
from fa4_ext.bench.results import save
from fa4_ext.bench.session import header, session
from fa4_ext.bench.timing import in_turns, prepare, sets_for, summary

TARGET_MS = 4.0
ROUNDS = 7
BATCH, HEADS, SEQLEN = 4, 16, 2048
STATES = {"before": nullcontext, "registered": fa4_ext.register}


def _mask() -> torch.Tensor:
    return torch.rand(SEQLEN, SEQLEN, device="cuda") > 0.1


# Each call has a name, and a head dim, a dtype and arguments.
CALLS = {
    "covered, for comparison": (128, torch.bfloat16, {}),
    "dropout_p=0.1": (128, torch.bfloat16, {"dropout_p": 0.1}),
    "head dim 192": (192, torch.bfloat16, {}),
    "head dim 256": (256, torch.bfloat16, {}),
    "head dim 256, causal": (256, torch.bfloat16, {"is_causal": True}),
    "attn_mask": (128, torch.bfloat16, {"attn_mask": _mask}),
    "float32": (128, torch.float32, {}),
}


def _backend(query: torch.Tensor, arguments: dict) -> str:
    """Returns the backend that PyTorch chooses for the call."""
    return (
        SDPBackend(torch._fused_sdp_choice(query, query, query, **arguments))
        .name.removesuffix("_ATTENTION")
        .lower()
    )


def measure(rounds: int) -> list[dict]:
    """Returns a row for each call and direction, with the backend and the median microseconds in
    each state."""
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
            prepared = {
                state: prepare(call, len(sets), enabled, TARGET_MS)
                for state, enabled in STATES.items()
            }
            for state, times in in_turns(prepared, rounds).items():
                with STATES[state]():
                    row[f"{state}_backend"] = _backend(sets[0][0], arguments)
                row[f"{state}_us"] = round(summary(times)["ms"] * 1e3, 1)
            rows.append(row)
        progress.finished()
    return rows


def print_table(rows: list[dict]) -> None:
    """Prints the rows as a table of Markdown."""
    print(f"B{BATCH} H{HEADS} S{SEQLEN}, microseconds\n")
    print("| call | direction | before | while registered | ratio |\n|---|---|---|---|---|")
    for row in rows:
        before, registered = (
            f"{row[f'{state}_us']:.0f} ({row[f'{state}_backend']})" for state in STATES
        )
        ratio = row["registered_us"] / row["before_us"]
        print(f"| {row['call']} | {row['direction']} | {before} | {registered} | {ratio:.2f} |")


def main() -> None:
    path = json_path(__doc__)
    with session():
        result = {"header": header(ROUNDS, "bf16", []), "rows": measure(ROUNDS)}
    print_table(result["rows"])
    if path:
        save(result, path)


if __name__ == "__main__":
    main()
