"""The speed rules: fitted to the measurements that are in the repository, and read by the planner
as they were fitted."""

from __future__ import annotations

import fa4_core
import pytest

from kernels import rules
from kernels.rules import Rule
from scripts.core_problem import core_problem
from tuning.fit_stock import fit, lines, read

ROWS = read()
RULES = rules.speed_rules()


def measured_problems() -> list[dict]:
    return [
        {
            "op": line["direction"], "dtype": "bf16", "layout": line["layout"], "capability": 90,
            "batch": int(line["batch"]),
            "seqlen_q": int(line["longest"] if line["layout"] == "varlen" else line["seqlen_q"]),
            "seqlen_k": int(line["longest"] if line["layout"] == "varlen" else line["seqlen_k"]),
            "total_q": int(line["total_q"]), "total_k": int(line["total_q"]),
            "num_heads": int(line["heads"]), "num_heads_kv": int(line["heads_kv"]),
            "head_dim": int(line["head_dim"]),
            "head_dim_v": int(line["head_dim"]), "is_causal": line["causal"] == "True",
            "window_size_left": -1,
            "window_size_right": -1, "deterministic": False,
        }
        for line in lines()
    ]  # fmt: skip


def test_rules_are_what_the_measurements_give():
    assert fit(ROWS) == RULES, "run python -m tuning.fit_stock"


def test_rules_are_read_as_they_were_written(tmp_path):
    rules.write(Rule, RULES, tmp_path / "rules.csv")
    assert rules.read(Rule, tmp_path / "rules.csv") == RULES


@pytest.mark.parametrize(
    ("op", "layout"),
    [(op, layout) for op in ("forward", "backward") for layout in ("dense", "varlen")],
)
def test_planner_applies_the_rules_to_every_measured_problem(op, layout):
    wrong, slower = [], []
    for row, problem in zip(ROWS, measured_problems(), strict=True):
        if (row.op, row.layout) != (op, layout):
            continue
        plan = fa4_core.plan(core_problem(problem), True)
        # The rules were measured with the default tile; tests/test_tile_rules.py has the others.
        if plan.supported and plan.kernel.tuned:
            continue
        if plan.supported == any(rule.holds(row) for rule in RULES):
            wrong.append((row, plan.reason))
        if plan.supported and row.ratio > 1.05:
            slower.append(row)
    assert not wrong, f"{len(wrong)} problems, the first: {wrong[0]}"
    if op == "forward":  # A forward has no rules.
        measured = [row.ratio for row in ROWS if row.op == "forward"]
        assert max(measured) < 1.3 and len(slower) < 0.02 * len(measured), (
            max(measured),
            len(slower),
            len(measured),
        )
    else:
        assert not slower, (
            f"{len(slower)} problems that stock runs faster go to our kernels, the first: "
            f"{slower[0]}"
        )
