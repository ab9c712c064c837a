"""Measures what it costs that keys and values lie in pages: the time of a forward whose cache has
pages of 256, 64 and 16 keys, beside the same forward of packed keys and values.

python -m benchmarks.pages --json pages.json

The pages are in a random order. Every result is compared with that of packed keys.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import accumulate

import torch

from benchmarks.command import json_path
from fa4_ext.bench.progress import Progress
from fa4_ext.bench.results import save
from fa4_ext.bench.session import header, session
from fa4_ext.bench.table import columns
from fa4_ext.bench.timing import in_turns, prepare, sets_for, summary
from fa4_ext.flash_attn import flash_attn_varlen_func

DTYPE = "bf16"
ROUNDS = 7
TARGET_MS = 8.0
PAGE_SIZES = (256, 64, 16)
PACKED = "packed"
# Both sides sum in the same order, but for the number of splits where few queries run.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Call:
    """Sequences of `queries` new tokens, the last of `keys` ones."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    heads_kv: int
    head_dim: int
    causal: bool = True

    @property
    def bytes(self) -> int:
        rows = self.queries * self.heads + 2 * self.keys * self.heads_kv
        return 2 * self.batch * rows * self.head_dim


CALLS = (
    Call("prompt 8k", 1, 8192, 8192, 32, 8, 128),
    Call("prompts 8 x 2k", 8, 2048, 2048, 32, 8, 128),
    Call("prompts 16 x 512", 16, 512, 512, 32, 8, 128),
    Call("chunk of 2k behind 16k", 1, 2048, 16384, 32, 8, 128),
    Call("chunks 4 x 1k behind 8k", 4, 1024, 8192, 32, 8, 128),
    Call("chunk of 2k behind 16k, full", 1, 2048, 16384, 32, 8, 128, causal=False),
    Call("D 64, chunk of 2k behind 16k", 1, 2048, 16384, 32, 8, 64),
    Call("D 64, prompt 8k", 1, 8192, 8192, 32, 8, 64),
    Call("D 96, chunk of 2k behind 16k", 1, 2048, 16384, 32, 8, 96),
    Call("D 192, chunk of 2k behind 16k", 1, 2048, 16384, 16, 4, 192),
    Call("D 256, chunk of 2k behind 16k", 1, 2048, 16384, 16, 4, 256),
    Call("decode 64 x 8k", 64, 1, 8192, 32, 8, 128),
    Call("decode 8 x 8k", 8, 1, 8192, 32, 8, 128),
    Call("decode 1 x 64k", 1, 1, 65536, 32, 8, 128),
    Call("speculation 8 x 16 behind 8k", 8, 16, 8192, 32, 8, 128),
    Call("D 64, decode 64 x 8k", 64, 1, 8192, 32, 8, 64),
)


def starts(batch: int, rows: int) -> torch.Tensor:
    return torch.tensor([0, *accumulate([rows] * batch)], dtype=torch.int32, device="cuda")


def make_inputs(call: Call) -> list[torch.Tensor]:
    """Makes random q, k and v of packed sequences."""
    sizes = (
        (call.queries, call.heads),
        (call.keys, call.heads_kv),
        (call.keys, call.heads_kv),
    )
    return [
        torch.randn(call.batch * rows, heads, call.head_dim, dtype=torch.bfloat16, device="cuda")
        for rows, heads in sizes
    ]


def in_pages(
    call: Call, sets: list[list[torch.Tensor]], page_size: int
) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """Puts keys and values into pages. Returns the inputs and the table that they share."""
    count = call.batch * call.keys // page_size
    order = torch.randperm(count, device="cuda")
    made = []
    for q, *keys_and_values in sets:
        caches = []
        for packed in keys_and_values:
            cache = packed.new_empty(count, page_size, *packed.shape[1:])
            cache[order] = packed.unflatten(0, (count, page_size))
            caches.append(cache)
        made.append([q, *caches])
    return made, order.to(torch.int32).view(call.batch, -1)


def attention_of(call: Call, sets: list, table: torch.Tensor | None):
    """Returns a function that runs the call on the i-th set of inputs."""
    cu_seqlens_q, cu_seqlens_k = starts(call.batch, call.queries), starts(call.batch, call.keys)
    used = torch.full((call.batch,), call.keys, dtype=torch.int32, device="cuda")
    lengths = {"cu_seqlens_k": cu_seqlens_k}
    if table is not None:
        lengths = {"cu_seqlens_k": None, "seqused_k": used, "block_table": table}

    def attend(i):
        with torch.no_grad():
            return flash_attn_varlen_func(
                *sets[i],
                cu_seqlens_q,
                max_seqlen_q=call.queries,
                max_seqlen_k=call.keys,
                causal=call.causal,
                **lengths,
            )

    return attend


def measure(calls: tuple[Call, ...]) -> list[dict]:
    """Returns a row for each call: microseconds of each layout."""
    rows = []
    progress = Progress(len(calls), what="calls")
    for call in calls:
        progress.started(call.name)
        sets = [make_inputs(call) for _ in range(max(2, sets_for(call.bytes)))]
        contenders = {PACKED: attention_of(call, sets, None)}
        for page_size in PAGE_SIZES:
            contenders[f"pages of {page_size}"] = attention_of(
                call, *in_pages(call, sets, page_size)
            )
        expected = contenders[PACKED](0)
        for name, attend in contenders.items():
            torch.testing.assert_close(
                attend(0), expected, atol=TOLERANCE, rtol=TOLERANCE, msg=f"{name}, {call.name}"
            )
        prepared = {
            name: prepare(attend, len(sets), torch.no_grad, TARGET_MS)
            for name, attend in contenders.items()
        }
        measured = in_turns(prepared, ROUNDS)
        results = {name: summary(times) for name, times in measured.items()}
        rows.append(vars(call) | {"results": results})
        progress.finished()
    return rows


def text(rows: list[dict]) -> str:
    names = [PACKED, *(f"pages of {size}" for size in PAGE_SIZES)]
    cells = []
    for row in rows:
        packed = row["results"][PACKED]["ms"]
        times = [row["results"][name]["ms"] for name in names]
        cells.append(
            (
                row["name"],
                [
                    f"{1000 * packed:.1f}",
                    *(f"{1000 * ms:.1f} ({ms / packed:.3f})" for ms in times[1:]),
                ],
            )
        )
    return "\n".join(columns("us (times packed)", names, cells))


def main() -> int:
    path = json_path(__doc__)
    with session():
        rows = measure(CALLS)
        result = {"header": header(ROUNDS, DTYPE, []), "rows": rows}
    print(text(rows))
    if path:
        save(result, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
