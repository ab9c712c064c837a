"""Runs flash-attn-4's own host code on a problem, without a GPU, and compares what it chose with a
kernel of ours.

A process of its own for an architecture: upstream reads it from the environment at import. Problems
come as JSON lines on standard input, differences go out as JSON lines. Compilation is intercepted,
tensors are fake: what is left is the host code's choices.
"""

import importlib
import json
import sys

import flash_attn.cute.interface as upstream
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import matrix

# These differences are ours on purpose: head_dim is a run-time value below the bucket, the head
# ratio is a run-time value, and so is the SM count.
DELIBERATE = {"check_hdim_oob", "check_hdim_v_oob", "qhead_per_kvhead", "TileScheduler"}
BLOCK_SPARSE_ONLY = {"q_subtile_factor", "kv_subtile_factor"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

compiled = []


def capture(kernel, *arguments, **_):
    compiled.append((kernel, arguments))
    return lambda *_: None


def fields(kernel) -> dict[str, str]:
    simple = (bool, int, float, str, type(None), tuple)
    return {
        name: repr(value)
        for name, value in vars(kernel).items()
        if isinstance(value, simple) and name not in DELIBERATE | BLOCK_SPARSE_ONLY
    }


def ours(name: str):
    kernel = next(kernel for kernel in matrix.matrix() if kernel.name == name)
    return importlib.import_module(f"kernels.{kernel.module.replace('/', '.')}").instantiate(kernel)


def tensors(problem: dict):
    """Returns query, key, value, output and the varlen arguments, with the buckets as head dims."""
    lead_q, lead_k = (
        (problem["batch"], problem["seqlen_q"]),
        (problem["batch"], problem["seqlen_k"]),
    )
    varlen = {}
    if problem["layout"] == "varlen":
        lead_q, lead_k = (problem["total_q"],), (problem["total_k"],)
        lengths = torch.empty(problem["batch"] + 1, dtype=torch.int32, device="cuda")
        varlen = dict(
            cu_seqlens_q=lengths,
            cu_seqlens_k=lengths,
            max_seqlen_q=problem["seqlen_q"],
            max_seqlen_k=problem["seqlen_k"],
        )
    rows_q, rows_k = (*lead_q, problem["num_heads"]), (*lead_k, problem["num_heads_kv"])
    bucket, bucket_v = problem["bucket"], problem["bucket_v"]
    shapes = (*rows_q, bucket), (*rows_k, bucket), (*rows_k, bucket_v), (*rows_q, bucket_v)
    return [
        torch.empty(shape, dtype=DTYPES[problem["dtype"]], device="cuda") for shape in shapes
    ], varlen


def run_upstream(problem: dict) -> None:
    for cached in vars(upstream).values():
        if hasattr(cached, "compile_cache"):
            cached.compile_cache = {}
    compiled.clear()
    bounds = {f"window_size_{side}": problem[f"window_size_{side}"] for side in ("left", "right")}
    window = {name: None if bound < 0 else bound for name, bound in bounds.items()}
    with FakeTensorMode():
        (query, key, value, out), varlen = tensors(problem)
        shared = dict(causal=problem["is_causal"], pack_gqa=False, **window, **varlen)
        if problem["op"] == "forward":
            upstream._flash_attn_fwd(query, key, value, return_lse=True, **shared)
            return
        heads_first = (problem["num_heads"], problem["total_q"])
        dense = (problem["batch"], problem["num_heads"], problem["seqlen_q"])
        lse = torch.empty(heads_first if varlen else dense, dtype=torch.float32, device="cuda")
        upstream._flash_attn_bwd(
            query,
            key,
            value,
            out,
            torch.empty_like(out),
            lse,
            deterministic=problem["deterministic"],
            **shared,
        )


def compare_objects(expected: list[str]) -> list[str]:
    """Compares our kernels, in the order of their first launch, with the objects that upstream
    would compile."""
    differences = []
    theirs = [kernel for kernel, _ in compiled]
    if len(theirs) != len(expected):
        return [f"upstream compiles {[type(kernel).__name__ for kernel in theirs]}, we {expected}"]
    for name, kernel in zip(expected, theirs, strict=True):
        mine = ours(name)
        if not isinstance(mine, type(kernel)):
            differences.append(f"{name}: upstream runs {type(kernel).__name__}")
            continue
        a, b = fields(mine), fields(kernel)
        differences += [
            f"{name}.{field}: ours {a.get(field)}, upstream {b.get(field)}"
            for field in a.keys() | b.keys()
            if a.get(field) != b.get(field)
        ]
    return differences


def compare_workspace(problem: dict, workspace: dict) -> list[str]:
    """Compares shapes of the backward's scratch tensors: upstream's fake tensors with our plan's
    sizes."""
    batch = [problem["batch"]] if problem["layout"] == "dense" else []
    heads, heads_kv = problem["num_heads"], problem["num_heads_kv"]
    bucket, bucket_v = problem["bucket"], problem["bucket_v"]
    _, arguments = next(entry for entry in compiled if "BackwardSm" in type(entry[0]).__name__)
    rows_q, rows_k = workspace["rows_q"], workspace["rows_k"]
    expected = {
        "lse_log2": (arguments[4], [*batch, heads, rows_q]),
        "delta": (arguments[5], [*batch, heads, rows_q]),
        "dq_accum": (arguments[6], [*batch, heads, rows_q * bucket]),
    }
    if heads != heads_kv:
        expected["dk_accum"] = (arguments[7], [*batch, heads_kv, rows_k * bucket])
        expected["dv_accum"] = (arguments[8], [*batch, heads_kv, rows_k * bucket_v])
    if problem["deterministic"]:
        tiles_q, tiles_k, cluster = workspace["tiles_q"], workspace["tiles_k"], workspace["cluster"]
        expected["dq_semaphore"] = (arguments[16], [problem["batch"], heads, tiles_q, cluster])
        if heads != heads_kv:
            expected["dk_semaphore"] = (arguments[17], [problem["batch"], heads_kv, tiles_k, 2])
            expected["dv_semaphore"] = (arguments[18], [problem["batch"], heads_kv, tiles_k, 2])

    def holds(name: str, shape: list[int], theirs: list[int]) -> bool:
        # Upstream trusts the caller's longest.
        if name.endswith("semaphore") and problem["layout"] == "varlen":
            return shape[:2] == theirs[:2] and shape[2] >= theirs[2] and shape[3] == theirs[3]
        return shape == theirs

    return [
        f"{name}: ours {shape}, upstream {list(theirs.shape)}"
        for name, (theirs, shape) in expected.items()
        if not holds(name, shape, list(theirs.shape))
    ]


def main() -> None:
    upstream.cute.compile = capture
    upstream.to_cute_tensor = lambda tensor, *_, **__: tensor
    upstream.utils.convert_from_dlpack_leading_static = lambda tensor, *_, **__: tensor
    for line in sys.stdin:
        problem = json.loads(line)
        run_upstream(problem)
        differences = compare_objects(problem["kernels"])
        if problem["op"] == "backward":
            differences += compare_workspace(problem, problem["workspace"])
        print(json.dumps(differences), flush=True)


if __name__ == "__main__":
    main()
