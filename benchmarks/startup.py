"""What a process pays once: the import, and the first forward and backward. Every sample is a process of its own."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from kernels.progress import Progress

# CUDA, its allocator, cuBLAS and autograd are warm, torch has chosen a backend once, before a contender is imported and called.
FIRST_CALL = """
import sys, time
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
q, k, v, do = (torch.randn(1, 1024, 16, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(4))
with sdpa_kernel(SDPBackend.MATH):
    out = torch.nn.functional.scaled_dot_product_attention(q.requires_grad_(), k, v, is_causal=True)
torch.autograd.grad(out, q, do)
torch.cuda.synchronize()
start = time.perf_counter()
from benchmarks.{module} import {function}
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


def _sdpa(backend: str):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def ours():
    import fa4_ext  # noqa: F401  registers

    return _sdpa("FLASH_ATTENTION")


def stock():
    return _sdpa("FLASH_ATTENTION")


def cudnn():
    return _sdpa("CUDNN_ATTENTION")


def fa4():
    from flash_attn.cute.interface import flash_attn_func

    def call(q, k, v):
        out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def _seconds(code: str) -> tuple[float, float]:
    environment = {name: value for name, value in os.environ.items() if name != "FA4_EXT_AUTOREGISTER"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    first, second = done.stdout.split()[-2:]
    return float(first), float(second)


def measure(names: list[str], samples: int, import_samples: int) -> dict:
    """Median seconds: of the first calls, by contender, and of the imports."""
    known = [name for name in names if name in ("ours", "stock", "cudnn", "fa4")]
    progress = Progress(len(known) * samples + 2 * import_samples, what="fresh processes")
    collected: dict[str, list[tuple[float, float]]] = {name: [] for name in known}
    for _ in range(samples):
        for name in known:
            progress.started(f"first call, {name}")
            try:
                collected[name].append(_seconds(FIRST_CALL.format(module="startup", function=name)))
            except RuntimeError as error:
                print(f"\nfirst call, {name}: {error}", file=sys.stderr)
            progress.finished()
    imports: dict[str, list[tuple[float, float]]] = {"torch": [], "torch, fa4_ext": []}
    for _ in range(import_samples):
        for name, second in (("torch", ""), ("torch, fa4_ext", "import fa4_ext")):
            progress.started(f"import {name}")
            imports[name].append(_seconds(IMPORT.format(second=second)))
            progress.finished()
    first_call = {
        name: {"import_s": statistics.median(t[0] for t in times), "first_call_s": statistics.median(t[1] for t in times)}
        for name, times in collected.items()
        if times
    }
    for result in first_call.values():
        if "stock" in first_call:
            result["beyond_stock_s"] = result["first_call_s"] - first_call["stock"]["first_call_s"]
    return {
        "first_call": first_call,
        "import_s": {name: statistics.median(sum(t) for t in times) for name, times in imports.items()},
        "import_beyond_torch_s": statistics.median(t[1] for t in imports["torch, fa4_ext"]),
    }
