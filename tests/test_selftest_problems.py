"""The self-test has problems for every kernel, and with its rivals disabled the planner takes the
kernel for them."""

from __future__ import annotations

import fa4_core
import pytest

from fa4_ext.selftest.problems import CALLED, Problem, others, problems_for
from kernels import matrix, table
from kernels.matrix import companions
from scripts.core_problem import core_problem

FACTS = ("registers", "spill_bytes", "shared_memory_bytes", "object_bytes")
# Every kernel of a wheel, as the library's manifest has it.
WHEEL = table.manifest([table.Built(kernel, dict.fromkeys(FACTS, 0)) for kernel in matrix.matrix()])
CALLED_FOR = [kernel for kernel in WHEEL if kernel["op"] in CALLED]
CAPABILITIES = {90: (90,), 100: (100, 103)}
EVERYTHING = {row.name for row in fa4_core.kernels()}
BIASES = {"random", "padding", "slopes", "causal"}


def as_planned(problem: Problem, capability: int) -> fa4_core.Problem:
    """Returns what csrc/aten makes of the call."""
    behind = problem.rows_behind
    return core_problem(
        {
            "op": "backward" if problem.backward else "forward",
            "dtype": problem.dtype,
            "layout": "varlen" if problem.varlen else "dense",
            "capability": capability,
            "batch": len(problem.seqlens_q),
            "seqlen_q": max(problem.seqlens_q),
            "seqlen_k": max(problem.seqlens_k),
            "total_q": sum(problem.seqlens_q) + behind,
            "total_k": sum(problem.seqlens_k) + behind,
            "page_size": problem.page_size,
            "num_heads": problem.heads,
            "num_heads_kv": problem.heads_kv,
            "head_dim": problem.head_dim,
            "head_dim_v": problem.head_dim_v,
            "is_causal": problem.is_causal,
            "window_size_left": problem.window[0],
            "window_size_right": problem.window[1],
            "deterministic": problem.deterministic,
            "peer": "cudnn" if problem.bias else "flash",
            "bias": (1, 1, *problem.bias_shape)[-4:-2] if problem.bias else None,
        }
    )


def alone(kernel: dict) -> fa4_core.KernelSet:
    # The table of the tests has kernels that no wheel has.
    left_out = {*others(kernel, WHEEL), *(EVERYTHING - {row["name"] for row in WHEEL})}
    return fa4_core.KernelSet(sorted(left_out))


@pytest.mark.parametrize("kernel", CALLED_FOR, ids=lambda kernel: kernel["name"])
def test_each_problem_of_a_kernel_is_planned_on_it(kernel):
    problems = problems_for(kernel)
    assert problems
    disabled = alone(kernel)
    for capability in CAPABILITIES[kernel["arch"]]:
        for problem in problems:
            plan = fa4_core.plan(
                as_planned(problem, capability), problem.by_stock, disabled=disabled
            )
            if kernel["op"] == "clear":
                assert plan.stock_is_faster, (str(problem), plan.reason)
            else:
                assert plan.kernel and plan.kernel.name == kernel["name"], (
                    str(problem),
                    plan.kernel and plan.kernel.name,
                    plan.reason,
                )


def test_no_rival_is_left_that_could_run_a_problem():
    """Where the kernel itself is disabled too, the problems go to PyTorch, with its name."""
    companions = {row["name"] for row in WHEEL if row["op"] not in CALLED}
    disabled = fa4_core.KernelSet(sorted(EVERYTHING - companions))
    for kernel in CALLED_FOR:
        if kernel["op"] == "clear":
            continue
        for problem in problems_for(kernel):
            plan = fa4_core.plan(
                as_planned(problem, CAPABILITIES[kernel["arch"]][0]),
                False,
                disabled=disabled,
            )
            assert not plan.supported and "is disabled" in plan.reason, (kernel["name"], problem)


def test_every_other_kernel_is_launched_with_one_that_is_called_for():
    launched = {name for kernel in CALLED_FOR for name in kernel["companions"]}
    assert launched == {kernel["name"] for kernel in WHEEL} - {
        kernel["name"] for kernel in CALLED_FOR
    }


def test_the_manifest_names_what_a_kernel_is_launched_with():
    for kernel, row in zip(matrix.matrix(), WHEEL, strict=True):
        present = companions(kernel).present
        assert row["companions"] == [companion.name for companion in present], kernel.name


@pytest.mark.parametrize("op", ["forward", "backward", "backward_keys"])
def test_the_problems_of_a_kernel_differ_as_they_should(op):
    """Lengths lie on both sides of a tile's end, some rows see no key, and heads share keys."""
    for kernel in (kernel for kernel in WHEEL if kernel["op"] == op):
        found = problems_for(kernel)
        longest = {length for problem in found for length in problem.seqlens_q}
        m = kernel["block_m"]
        assert {m - 1, m, 2 * m + 1} <= longest, kernel["name"]
        keys = {length for problem in found for length in problem.seqlens_k}
        assert max(keys) > 8 * kernel["block_n"], kernel["name"]
        assert any(
            q > k
            for problem in found
            for q, k in zip(problem.seqlens_q, problem.seqlens_k, strict=True)
        )
        grouped = {problem.heads > problem.heads_kv for problem in found}
        assert grouped == ({kernel["grouped"]} if op == "backward" else {False, True})
        below = {problem.head_dim < kernel["head_dim"] for problem in found}
        whole_rows = kernel["arch"] == 100 and not kernel["grouped"] and op == "backward"
        window_or_varlen = kernel["mask"] == "window" or kernel["layout"] == "varlen"
        assert below == ({False} if whole_rows and window_or_varlen else {False, True})
        biases = {problem.bias for problem in found}
        assert biases == (BIASES if kernel["mask"] == "bias" else {""}), kernel["name"]
