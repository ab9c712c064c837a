"""Converts a dict to the planner's Problem, for the tests and the documents.

fa4_core is the planner as `make build` compiles it into build/tests, with the whole matrix whatever
subset is compiled.
"""

from __future__ import annotations

import fa4_core

SM_COUNT = {90: 132, 100: 148, 103: 160}
FIELDS = (
    "batch", "seqlen_q", "seqlen_k", "total_q", "total_k", "num_heads", "num_heads_kv", "head_dim",
    "head_dim_v", "is_causal", "window_size_left", "window_size_right", "deterministic",
)  # fmt: skip


def core_problem(problem: dict) -> fa4_core.Problem:
    core = fa4_core.Problem()
    core.op = fa4_core.Op.BACKWARD if problem["op"] == "backward" else fa4_core.Op.FORWARD
    core.dtype = fa4_core.Dtype.BF16 if problem["dtype"] == "bf16" else fa4_core.Dtype.FP16
    core.layout = fa4_core.Layout.VARLEN if problem["layout"] == "varlen" else fa4_core.Layout.DENSE
    if problem.get("peer") == "cudnn":
        core.peer = fa4_core.Peer.CUDNN
    core.capability = problem["capability"]
    core.sm_count = SM_COUNT.get(problem["capability"], 100)
    for field in FIELDS:
        setattr(core, field, problem[field])
    # These describe a forward's keys.
    for field in ("page_size", "num_splits"):
        setattr(core, field, problem.get(field, 0))
    for field in ("keys_in_use", "causal_top_left", "longest_is_zero"):
        setattr(core, field, problem.get(field, False))
    core.pages_in_rows = problem.get("pages_in_rows", True)
    # The sizes of a bias are those of its batch and heads, 1 where it is broadcast.
    if bias := problem.get("bias"):
        core.bias = True
        core.bias_batch, core.bias_heads = bias
        core.bias_by_query = problem.get("bias_by_query", True)
        core.bias_suits_cudnn = problem.get("bias_suits_cudnn", True)
    return core
