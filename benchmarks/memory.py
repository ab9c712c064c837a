"""Measures the device memory that a call of attention takes in addition to what is taken before it:
with our kernels, with PyTorch's flash attention and, where it is installed, with flash-attn-4.

python -m benchmarks.memory --json benchmarks/results/h200_memory.json

The result is the most that torch's allocator holds while the call runs, less what it held before.
A forward, which autograd records, starts with q, k and v; it allocates the output, logsumexp and
whatever else the call needs. A backward starts with the output, what the forward saved and the
output's gradient too; it allocates dq, dk, dv and the scratch memory. What the driver takes for a
kernel's code is not counted. On long contexts the last rows of output and gradients are compared
with attention in fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from benchmarks.command import json_path
from fa4_ext.bench.contenders import Contender, contenders
from fa4_ext.bench.correctness import MAX_RELATIVE_ERROR, attention, corner_of, make_inputs
from fa4_ext.bench.progress import Progress
from fa4_ext.bench.results import save
from fa4_ext.bench.session import header, session
from fa4_ext.bench.shapes import DIRECTIONS, Shape, packed, square
from fa4_ext.bench.table import FAILED, NONE, columns
from fa4_ext.bench.throughput import attention_of

NAMES = ("ours", "stock", "fa4")
DTYPE = "bf16"
ROUNDS = 3  # of the ceiling in the header
LONG = 1 << 17
# The rows of a long context that are compared: queries, which see every key, and keys, which no
# other query sees.
LAST_ROWS = 256
MIB = 1 << 20
T = TypeVar("T")

MIXED = (8192, 4096, 2048, 1024, 512, 256, 128, 128)
SHAPES = (
    *(
        square(
            4,
            2048 // head_dim,
            4096,
            head_dim,
            causal,
            name=f"D{head_dim} {'causal' if causal else 'full'}",
        )
        for head_dim in (64, 128, 256)
        for causal in (False, True)
    ),
    square(4, 32, 4096, 128, True, heads_kv=8, name="D128 causal, heads 32/8"),
    square(128, 12, 197, 64, False, name="ViT-B/16, length 197"),
    packed(16, 16, 128, True, (1024,) * 16, name="varlen 16 x 1024"),
    packed(32, 8, 128, True, MIXED, name="varlen 128 to 8192, heads 32/8"),
    Shape(64, 32, 8, 1, 8192, 128, False, name="decode 64 x 8192, heads 32/8"),
    Shape(1, 32, 8, 1, 65536, 128, False, name="decode 1 x 65536, heads 32/8"),
    square(1, 16, LONG, 128, True, name="128k tokens, heads 16"),
    square(1, 2, 1 << 20, 128, True, heads_kv=1, name="1M tokens, heads 2/1"),
)


def directions(shape: Shape) -> tuple[str, ...]:
    """Returns the directions of a shape. Decoding has no backward."""
    return DIRECTIONS if shape.seqlen_q == shape.seqlen_k else DIRECTIONS[:1]


def returned_bytes(shape: Shape, direction: str) -> int:
    """Returns the bytes of what every implementation returns: output and fp32 logsumexp, or the
    three gradients."""
    if direction == "backward":
        return shape.bytes
    return shape.total_q * shape.heads * (2 * shape.head_dim + 4)


def peak(call: Callable[[], T]) -> tuple[T, int]:
    """Runs the call and returns its result, and the peak of allocated bytes above those that were
    allocated before."""
    torch.cuda.synchronize()
    # After this no block of the allocator is larger than what it is for.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def error_of_last_rows(
    shape: Shape, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> float:
    """Returns the largest relative error of out, dq, dk and dv against fp32 in the last rows of the
    last sequence, for the last key/value head and the query heads that share it. The problem must
    be dense causal self-attention. `inputs` are q, k, v and dO."""
    q, k, v, do = (corner_of(t, shape, -1) for t in inputs)
    last = slice(-LAST_ROWS, None)
    truths = attention(q[:, last], k, v, do[:, last], causal=True)
    pairs = (
        (corner_of(output, shape, -1)[:, last].float(), truth[:, last])
        for output, truth in zip(outputs, truths, strict=True)
    )
    return max(((output - truth).norm() / truth.norm()).item() for output, truth in pairs)


def _measure(contender: Contender, shape: Shape, inputs: list[torch.Tensor]) -> dict[str, dict]:
    """Returns the peak bytes of each direction and, of a long context, the error.

    Raises:
        RuntimeError: it is larger than rounding explains.
    """
    *qkv, do = inputs
    leaves = [t.detach().requires_grad_() for t in qkv]
    attend = attention_of(contender, shape)
    with contender.enabled():
        out, forward = peak(lambda: attend(*leaves))
        found = {"forward": {"peak_bytes": forward}}
        if "backward" not in directions(shape):
            return found
        gradients, backward = peak(lambda: torch.autograd.grad(out, leaves, do))
    found["backward"] = {"peak_bytes": backward}
    if shape.longest >= LONG:
        error = error_of_last_rows(shape, inputs, [out.detach(), *gradients])
        if not error <= MAX_RELATIVE_ERROR[DTYPE]:
            raise RuntimeError(
                f"wrong: relative error {error:.2e} against fp32 in the last {LAST_ROWS} rows"
            )
        found = {direction: row | {"relative_error": error} for direction, row in found.items()}
    return found


def measure(chosen: list[Contender], shapes: tuple[Shape, ...]) -> list[dict]:
    """Returns a row for each shape and direction, with the shape, the returned bytes and, for each
    contender, its peak or why it has none."""
    rows = []
    progress = Progress(len(shapes) * len(chosen), what="measurements")
    for shape in shapes:
        inputs = make_inputs(shape, DTYPE)
        fields = {key: value for key, value in vars(shape).items() if key != "lengths"} | {
            "layout": shape.layout
        }
        results: dict[str, dict] = {}
        for contender in chosen:
            progress.started(f"{contender.name}, {shape.name}")
            try:
                results[contender.name] = _measure(contender, shape, inputs)
            except Exception as error:
                # Other packages raise errors of their own types.
                print(f"\n{contender.name}, {shape.name}: {error}", file=sys.stderr)
                results[contender.name] = {
                    direction: {"error": f"{error!r:.300}"} for direction in directions(shape)
                }
            progress.finished()
        for direction in directions(shape):
            row = {
                "name": f"{shape.name} {direction}",
                "direction": direction,
                "returned_bytes": returned_bytes(shape, direction),
            }
            rows.append(
                fields
                | row
                | {"results": {name: found[direction] for name, found in results.items()}}
            )
    return rows


def _cell(found: dict | None) -> str:
    if found is None:
        return NONE
    return FAILED if "error" in found else f"{found['peak_bytes'] / MIB:.1f}"


def text(rows: list[dict], names: list[str]) -> str:
    """Returns a table in MiB, and for each other contender the row in which our memory is largest
    relative to it."""
    cells = [
        (
            row["name"],
            [
                f"{row['returned_bytes'] / MIB:.1f}",
                *(_cell(row["results"].get(name)) for name in names),
            ],
        )
        for row in rows
    ]
    lines = columns("MiB at most", ["returned", *names], cells)
    for name in names:
        ratios = {
            row["name"]: row["results"]["ours"]["peak_bytes"] / row["results"][name]["peak_bytes"]
            for row in rows
            if name != "ours"
            and all("peak_bytes" in row["results"].get(who, {}) for who in ("ours", name))
        }
        if ratios:
            most = max(ratios, key=ratios.get)
            lines.append(f"ours takes at most {ratios[most]:.3f} of {name}'s ({most})")
    return "\n".join(lines)


def main() -> None:
    path = json_path(__doc__)
    chosen = [contender for contender in contenders() if contender.name in NAMES]
    with session():
        result = {"header": header(ROUNDS, DTYPE, chosen), "rows": measure(chosen, SHAPES)}
    print(text(result["rows"], [contender.name for contender in chosen]))
    if path:
        save(result, path)
    failed = [
        row["name"]
        for row in result["rows"]
        if any("error" in found for found in row["results"].values())
    ]
    if failed:
        sys.exit(f"{len(failed)} rows failed, first {failed[0]}")


if __name__ == "__main__":
    main()
