"""The planner against flash-attn-4's own host code, over random problems: the same kernels,
constants and scratch shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fa4_core
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from plan_problems import problems

from kernels import matrix, shared_memory
from scripts.core_problem import SM_COUNT, core_problem

ROWS = fa4_core.kernels()
# The kernels of our own.
OWN = {k.name for k in matrix.with_candidates() if shared_memory.computed(k) is not None}
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=[90, 100], ids=["sm90", "sm100"])
def upstream(request):
    """Starts a process in which upstream's host code believes to be on the architecture."""
    arch = request.param
    environment = os.environ | {
        "CUTE_DSL_ARCH": {90: "sm_90a", 100: "sm_100f"}[arch], "FLASH_ATTENTION_ARCH": f"sm_{arch}",
        "FLASH_ATTENTION_HD256_GENERIC_BWD": "1",  # kernels/configs_sm100.py
        "FLASH_ATTENTION_NUM_SMS": str(SM_COUNT[arch]), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("upstream_host.py"))]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def compare(request: dict) -> list[str]:
        print(json.dumps(request), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, f"upstream's process ended with {process.wait()} on {request}"
        return json.loads(answer)

    yield arch, compare
    process.stdin.close()
    process.wait()


def compiled(kernel) -> list[str]:
    """Returns names of the kernels that a plan launches, each once, in the order of their first
    launch."""
    if kernel.op == fa4_core.Op.FORWARD:
        return [kernel.name]
    postprocess = [
        kernel.postprocess_dq,
        *([kernel.postprocess_dk, kernel.postprocess_dv] if kernel.grouped else []),
    ]
    return list(
        dict.fromkeys(
            [ROWS[kernel.preprocess].name, kernel.name, *(ROWS[row].name for row in postprocess)]
        )
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_plan_chooses_what_upstream_would_compile(upstream, data):
    arch, compare = upstream
    # Hopper's forward kernels are our own.
    ops = ("backward",) if arch == 90 else ("forward", "backward")
    problem = data.draw(problems(capabilities=(arch,), ops=ops))
    # Upstream compiles kernels of their own for a pair of query tiles that is a whole sequence;
    # ours runs the ones for longer ones.
    assume(not (arch == 100 and problem["op"] == "forward" and 128 < problem["seqlen_q"] <= 256))
    if (
        problem["window_size_left"] >= problem["seqlen_k"]
        or problem["window_size_right"] >= problem["seqlen_k"]
    ):
        # A mask that masks nothing is none, to us and the stock kernel.
        problem |= {
            "window_size_left": -1,
            "window_size_right": -1,
        }
    plan = fa4_core.plan(core_problem(problem), False)
    assert plan.supported, (problem, plan.reason)
    # tests/test_plan.py and test_tiles.py say when kernels of our own run.
    assume(plan.kernel.name not in OWN)
    # This tile was measured to be faster; tests/test_tile_rules.py says where.
    assume(not plan.kernel.tuned)
    # Below the bucket, of which upstream is not told here, SM100 gradients may come from
    # accumulators (csrc/core/plan/workspace.cpp).
    assume(not (plan.kernel.grouped and problem["num_heads"] == problem["num_heads_kv"]))
    # Upstream gives D 256 a pair of CTAs for a single tile of queries too, where they are few
    # enough for the GPU to hold at once.
    single_tile = problem["op"] == "forward" and problem["seqlen_q"] <= 128
    tiles = problem["batch"] * problem["num_heads"]
    assume(
        not (
            arch == 100
            and plan.kernel.head_dim == 256
            and single_tile
            and 2 * tiles <= SM_COUNT[arch]
        )
    )
    # Upstream refuses these (kernels/sm90/backward.py).
    assume(
        not (arch == 90 and plan.kernel.grouped and plan.kernel.head_dim != plan.kernel.head_dim_v)
    )
    workspace = {
        name: getattr(plan.workspace, name)
        for name in ("rows_q", "rows_k", "tiles_q", "tiles_k", "cluster")
    }
    buckets = {"bucket": plan.kernel.head_dim, "bucket_v": plan.kernel.head_dim_v}
    request = problem | buckets | {"kernels": compiled(plan.kernel), "workspace": workspace}
    differences = compare(request)
    assert not differences, f"{problem}\n" + "\n".join(differences)
