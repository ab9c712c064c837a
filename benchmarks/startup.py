"""Measures what a process pays once: the import, and the first forward and backward. Every sample
is taken in a process of its own.

python -m benchmarks.startup --json benchmarks/results/h200_startup.json
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from benchmarks import first_calls
from benchmarks.command import json_path
from fa4_ext.bench.contenders import contenders
from fa4_ext.bench.progress import Progress
from fa4_ext.bench.results import save
from fa4_ext.bench.session import header, session
from fa4_ext.bench.table import columns

SAMPLES = 5
ROUNDS = 7  # of the ceiling in the header

# Before a contender is imported and called, CUDA, its allocator, cuBLAS and autograd are warm, and
# torch has chosen a backend once.
FIRST_CALL = """
import sys, time
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
shape, options = (1, 1024, 16, 128), dict(dtype=torch.bfloat16, device="cuda")
q, k, v, do = (torch.randn(shape, **options).transpose(1, 2) for _ in range(4))
with sdpa_kernel(SDPBackend.MATH):
    out = torch.nn.functional.scaled_dot_product_attention(q.requires_grad_(), k, v, is_causal=True)
torch.autograd.grad(out, q, do)
torch.cuda.synchronize()
start = time.perf_counter()
from benchmarks.first_calls import {function}
call = {function}()
imported = time.perf_counter()
leaves = [t.requires_grad_() for t in (q, k, v)]
torch.autograd.grad(call(*leaves), leaves, do)
torch.cuda.synchronize()
print(imported - start, time.perf_counter() - imported)
"""

IMPORT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
{second}
print(middle - start, time.perf_counter() - middle)
"""


def _seconds(code: str) -> tuple[float, float]:
    environment = {
        name: value for name, value in os.environ.items() if name != "FA4_EXT_AUTOREGISTER"
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    if done.returncode:
        raise RuntimeError(
            done.stderr.strip().splitlines()[-1]
            if done.stderr.strip()
            else f"exit {done.returncode}"
        )
    first, second = done.stdout.split()[-2:]
    return float(first), float(second)


def measure(names: list[str], samples: int) -> dict:
    """Returns median seconds of each contender's first calls, and of the imports."""
    progress = Progress((len(names) + 2) * samples, what="fresh processes")
    collected: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(samples):
        for name in names:
            progress.started(f"first call, {name}")
            try:
                collected[name].append(_seconds(FIRST_CALL.format(function=name)))
            except RuntimeError as error:
                print(f"\nfirst call, {name}: {error}", file=sys.stderr)
            progress.finished()
    imports: dict[str, list[tuple[float, float]]] = {"torch": [], "torch, fa4_ext": []}
    for _ in range(samples):
        for name, second in (("torch", ""), ("torch, fa4_ext", "import fa4_ext")):
            progress.started(f"import {name}")
            imports[name].append(_seconds(IMPORT.format(second=second)))
            progress.finished()
    first_call = {
        name: {
            "import_s": statistics.median(t[0] for t in times),
            "first_call_s": statistics.median(t[1] for t in times),
        }
        for name, times in collected.items()
        if times
    }
    for result in first_call.values():
        if "stock" in first_call:
            result["beyond_stock_s"] = result["first_call_s"] - first_call["stock"]["first_call_s"]
    return {
        "first_call": first_call,
        "import_s": {
            name: statistics.median(sum(t) for t in times) for name, times in imports.items()
        },
        "import_beyond_torch_s": statistics.median(t[1] for t in imports["torch, fa4_ext"]),
    }


def print_table(startup: dict, names: list[str]) -> None:
    titles = {
        "import_s": "import, s",
        "first_call_s": "first forward+backward, s",
        "beyond_stock_s": "beyond stock's, s",
    }
    first = startup["first_call"]
    rows = [
        (
            title,
            [f"{first[name][key]:.3f}" if key in first.get(name, {}) else "-" for name in names],
        )
        for key, title in titles.items()
    ]
    print("\n".join(columns("", names, rows)))
    imports = ", ".join(
        f"import {name}: {seconds:.3f} s" for name, seconds in startup["import_s"].items()
    )
    print(f"{imports}; fa4_ext itself: {1e3 * startup['import_beyond_torch_s']:.0f} ms")


def main() -> None:
    path = json_path(__doc__)
    chosen = [contender for contender in contenders() if hasattr(first_calls, contender.name)]
    names = [contender.name for contender in chosen]
    with session():
        result = {"header": header(ROUNDS, "bf16", chosen), "startup": measure(names, SAMPLES)}
    print_table(result["startup"], names)
    if path:
        save(result, path)


if __name__ == "__main__":
    main()
