"""Calls whose kernels are disabled: the results of another kernel, or of PyTorch's, are right."""

from __future__ import annotations

import cases
import pytest
import torch
from calls import explained, run_flash
from cases import dense, make_inputs, varlen
from compare import assert_matches_reference

import fa4_ext

PROBLEMS = {
    "dense": dense(239, 239, head_dim=64, is_causal=True),
    "varlen": varlen((127, 1, 300), head_dim=128, heads_kv=2),
    "few queries": dense(3, 1023, head_dim=128),
}


def kernels(problem: cases.Problem, inputs: cases.Inputs) -> list[str]:
    """Returns the forward's and the backward's kernel; an empty text stands for PyTorch's own."""
    return [explained(problem, inputs, backward=backward)[1] for backward in (False, True)]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("half", ["forward", "backward", "both", "all"])
def test_results_are_right_without_the_kernels(name, half):
    problem = PROBLEMS[name]
    torch.manual_seed(0)
    inputs = make_inputs(problem)
    usual = kernels(problem, inputs)
    assert all(usual), usual
    disable = {"forward": usual[:1], "backward": usual[1:], "both": usual, "all": ["*"]}[half]
    with fa4_ext.register(speed_rules=False, disable=disable):
        running = kernels(problem, inputs)
        assert not {*running} & {*disable}, running
        assert (running == ["", ""]) == (half == "all"), running
        # PyTorch's lse of a row without keys is another; these problems have no such row.
        assert_matches_reference(problem, inputs, run_flash(problem, inputs, backward=True))
