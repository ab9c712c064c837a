"""Forward and backward of one call on different kernels, ours and PyTorch's: each pair computes the
derivative of one function."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from calls import flash_backward, flash_forward, run_flash
from cases import Inputs, Problem, dense, make_inputs, poison, varlen
from compare import assert_matches_reference
from reference import Result

import fa4_ext

PAIRS = {"ours-ours": (1, 1), "ours-stock": (1, 0), "stock-ours": (0, 1), "stock-stock": (0, 0)}
FIELDS = dict(heads=4, heads_kv=2, head_dim=64)
# The two could read these differently. Lengths as short as these have rows that see no key, and
# sequences beside longer ones.
CASES = {
    "full": dense(129, 77, **FIELDS),
    "causal": dense(129, 129, **FIELDS, is_causal=True),
    "rows_without_keys": dense(200, 77, **FIELDS, is_causal=True),
    "right_bound": dense(150, 200, **FIELDS, window=(-1, 13)),
    "right_bound_and_more_queries": dense(200, 150, **FIELDS, window=(-1, 13)),
    "left_bound_and_more_keys": dense(77, 129, **FIELDS, window=(13, -1)),
    "left_bound_and_one_query_more": dense(78, 77, **FIELDS, window=(13, -1)),
    "both_bounds": dense(200, 150, **FIELDS, window=(7, 13)),
    "window_of_the_diagonal": dense(100, 100, **FIELDS, window=(0, 0)),
    "causal_with_a_left_bound": dense(200, 150, **FIELDS, is_causal=True, window=(7, -1)),
    "bounds_beyond_the_keys": dense(200, 150, **FIELDS, window=(500, 300)),
    "scale": dense(129, 77, **FIELDS, scale=0.3),
    "one_query": dense(1, 77, **FIELDS, is_causal=True),
    "sequences": varlen((129, 7, 64), (77, 129, 64), **FIELDS),
    "causal_sequences_with_rows_without_keys": varlen(
        (129, 7, 64), (77, 129, 3), **FIELDS, is_causal=True
    ),
    "sequences_without_keys": varlen((129, 7, 64), (77, 0, 64), **FIELDS),
    "sequences_without_rows": varlen((129, 0, 64), (77, 0, 64), **FIELDS, is_causal=True),
    "sequences_with_both_bounds": varlen((129, 7, 64), (77, 129, 3), **FIELDS, window=(7, 13)),
    "sequences_with_a_left_bound": varlen((129, 7, 64), (129, 9, 64), **FIELDS, window=(7, -1)),
    "sequences_shorter_than_max_k": varlen(
        (64, 7), (60, 7), **FIELDS, window=(7, 65), slack=(9, 9)
    ),
}


def by(ours: int):
    return fa4_ext.register(fallback="error", speed_rules=False) if ours else nullcontext()


def run(problem: Problem, x: Inputs, forward_ours: int, backward_ours: int) -> Result:
    poison(x)
    with by(forward_ours):
        forward = flash_forward(problem, x)
    poison(x)
    with by(backward_ours):
        return Result(*forward[:2], *flash_backward(problem, x, forward))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("case", CASES)
def test_pair(case, pair):
    problem = CASES[case]
    x = make_inputs(problem)
    # PyTorch's kernels write plus infinity as the logsumexp of a row without keys, ours minus
    # infinity; a backward takes both.
    assert_matches_reference(problem, x, run(problem, x, *PAIRS[pair]), check_lse=False)


@pytest.mark.parametrize("pair", PAIRS)
def test_rows_of_nan(pair):
    """A query of NaN spoils its own gradient and those of its sequence's keys, of those that it
    sees in any case."""
    problem = varlen((129, 64), **FIELDS, is_causal=True)
    x = make_inputs(problem)
    x.q[3] = float("nan")
    result = run(problem, x, *PAIRS[pair])
    out, dq, dk, dv = (
        set(t.isnan().flatten(1).any(1).nonzero().flatten().tolist())
        for t in (result.out, result.dq, result.dk, result.dv)
    )
    assert out == dq == {3}, (out, dq)
    for spoiled in (dk, dv):
        assert {0, 1, 2, 3} <= spoiled <= set(range(129)), spoiled


@pytest.mark.parametrize("unbounded", (None, -1, -7))
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("head_dim", (64, 128))
def test_a_left_bound_alone_as_users_call_it(head_dim, heads, unbounded):
    """PyTorch's kernel takes max_k for the right bound, so no speed rule may leave it one half of
    the call.

    Sequences as short and as many as make a speed rule hold; their first queries see keys by the
    definition of the window alone.
    """
    problem = varlen(
        (100, 90, 3) * 100,
        (10, 20, 3) * 100,
        heads=heads[0],
        heads_kv=heads[1],
        head_dim=head_dim,
        window=(5, -1),
    )
    x = make_inputs(problem)
    with fa4_ext.register():
        result = run_flash(problem, x, backward=True, window_size_right=unbounded)
    assert_matches_reference(problem, x, result)


@pytest.mark.parametrize("bounds", [(2**32 + 3, -1), (3, 2**32 + 1), (2**40, 2**40)], ids=str)
def test_bounds_beyond_int32_as_users_call_them(bounds):
    """PyTorch narrows them to 32 bits."""
    problem = varlen((40, 30) * 200, heads=4, heads_kv=4, head_dim=64, window=bounds)
    x = make_inputs(problem)
    with fa4_ext.register():
        result = run_flash(problem, x, backward=True)
    assert_matches_reference(problem, x, result)


def test_a_dense_left_bound_alone_as_users_call_it():
    problem = dense(128, 60, batch=3, heads=8, heads_kv=2, head_dim=128, window=(5, -1))
    x = make_inputs(problem)
    with fa4_ext.register():
        result = run_flash(problem, x, backward=True)
    assert_matches_reference(problem, x, result)


def test_keys_in_use():
    """PyTorch's backward has no seqused_k: with all keys in use, which says nothing, every pair
    agrees."""
    problem = varlen((129, 7, 64), (77, 129, 64), **FIELDS)
    x = make_inputs(problem)
    used = torch.tensor(problem.seqlens_k, dtype=torch.int32, device=x.q.device)
    for forward_ours, backward_ours in PAIRS.values():
        with by(forward_ours):
            forward = flash_forward(problem, x, seqused_k=used)
        with by(backward_ours):
            gradients = flash_backward(problem, x, forward)
        assert_matches_reference(problem, x, Result(*forward[:2], *gradients), check_lse=False)
