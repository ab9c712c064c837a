"""Packed sequences among rows that are none of theirs: a neighbour of NaN, a buffer that is longer
than its sequences."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from calls import deterministic, explained, run_flash
from cases import DTYPES, HEAD_DIMS, HEADS, MASKS, Inputs, Problem, make_inputs, varlen
from compare import assert_matches_reference
from groups import groups_alone
from packed_rows import NAN, amid, assert_zero_outside, cut
from reference import Result

import fa4_ext

# Lengths that are no multiples of a tile, so that last tiles go on into what is beside them. One
# sequence has no queries, one no keys.
SEQLENS_Q, SEQLENS_K = (129, 0, 65, 300, 7), (129, 64, 0, 200, 77)
MATRIX = list(product(DTYPES, HEAD_DIMS, MASKS, HEADS))
NAMES = ["-".join(map(str, row)) for row in MATRIX]


def check(problem: Problem, before: int, after: int) -> None:
    x = make_inputs(problem)
    counts = sum(problem.seqlens_q), sum(problem.seqlens_k)
    result = run_flash(problem, amid(x, before, after), backward=True)
    assert_matches_reference(problem, x, cut(result, before, *counts))
    assert_zero_outside(result, before, *counts)


@pytest.mark.usefixtures("strict")
class TestOurs:
    @pytest.mark.parametrize(("dtype", "head_dim", "mask", "heads"), MATRIX, ids=NAMES)
    def test_rows_beside_the_sequences(self, dtype, head_dim, mask, heads):
        fields = dict(
            dtype=DTYPES[dtype],
            head_dim=head_dim,
            heads=HEADS[heads][0],
            heads_kv=HEADS[heads][1],
            **MASKS[mask],
        )
        check(varlen(SEQLENS_Q, SEQLENS_K, **fields), 0, 90)

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize("mask", MASKS)
    def test_deterministic(self, mask, head_dim):
        with deterministic():
            check(
                varlen(SEQLENS_Q, SEQLENS_K, head_dim=head_dim, heads=4, heads_kv=2, **MASKS[mask]),
                5,
                300,
            )

    @pytest.mark.parametrize("head_dim", (64, 128))
    @pytest.mark.parametrize("mask", ("full", "causal"))
    def test_groups_of_heads(self, mask, head_dim):
        problem = varlen(
            SEQLENS_Q, SEQLENS_K, head_dim=head_dim, heads=6, heads_kv=2, **MASKS[mask]
        )
        with groups_alone():
            check(problem, 5, 300)

    @pytest.mark.parametrize("head_dims", [(192, 128), (40, 120), (96, 72)], ids=str)
    def test_head_dims(self, head_dims):
        check(
            varlen(
                SEQLENS_Q, SEQLENS_K, head_dim=head_dims[0], head_dim_v=head_dims[1], is_causal=True
            ),
            3,
            77,
        )

    @pytest.mark.parametrize(
        "rows", [(0, 1), (1, 0), (0, 20_000), (20_000, 3), (127, 129)], ids=str
    )
    @pytest.mark.parametrize("heads", HEADS)
    def test_how_many_rows(self, rows, heads):
        check(
            varlen(
                (65, 128),
                heads=HEADS[heads][0],
                heads_kv=HEADS[heads][1],
                head_dim=64,
                is_causal=True,
            ),
            *rows,
        )

    def test_no_sequence_has_a_row(self):
        """A step of static shape has nothing left to do."""
        problem = varlen((1, 1), heads=2, heads_kv=2)
        x = make_inputs(replace(problem, seqlens_q=(50, 50), seqlens_k=(50, 50)))
        x.cu_seqlens_q.zero_(), x.cu_seqlens_k.zero_()
        result = run_flash(problem, x, backward=True)
        assert not any(gradient.any() for gradient in (result.dq, result.dk, result.dv))

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("heads", HEADS)
    def test_a_sequence_of_nans_stays_by_itself(self, heads, mask, head_dim):
        """The NaNs are in query, key, value and the gradient of the output."""
        lengths = (129, 64, 65, 577)
        problem = varlen(
            lengths,
            heads=HEADS[heads][0],
            heads_kv=HEADS[heads][1],
            head_dim=head_dim,
            **MASKS[mask],
        )
        x = make_inputs(problem)
        spoiled = slice(129 + 64, 129 + 64 + 65)
        for tensor in (x.q, x.k, x.v, x.do):
            tensor[spoiled] = NAN
        result = run_flash(problem, x, backward=True)
        assert all(
            getattr(result, name)[spoiled].isnan().all() for name in ("out", "dq", "dk", "dv")
        )
        kept = torch.ones(sum(lengths), dtype=torch.bool, device=x.q.device)
        kept[spoiled] = False
        others = varlen(
            (129, 64, 577),
            heads=problem.heads,
            heads_kv=problem.heads_kv,
            head_dim=head_dim,
            **MASKS[mask],
        )
        clean = Inputs(
            *(t[kept] for t in (x.q, x.k, x.v, x.do)), cu_seqlens_q=None, cu_seqlens_k=None
        )
        rows = (result.out, result.dq, result.dk, result.dv)
        out, dq, dk, dv = (t[kept] for t in rows)
        assert_matches_reference(others, clean, Result(out, result.lse[:, kept], dq, dk, dv))


@pytest.mark.parametrize("heads", ("mha", "gqa"))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_where_a_speed_rule_leaves_the_backward_to_pytorch(heads, head_dim):
    """With short sequences, some of them without queries, the same rows are written as by our own
    backward."""
    problem = varlen(
        (16, 0, 9) * 150,
        (16, 7, 9) * 150,
        heads=HEADS[heads][0],
        heads_kv=HEADS[heads][1],
        head_dim=head_dim,
        is_causal=True,
    )
    x = make_inputs(problem)
    with fa4_ext.register(fallback="stock"):
        supported, _, reason = explained(problem, x, backward=True, speed_rules=True)
        assert not supported and "faster" in reason, f"no speed rule holds: {reason!r}"
        check(problem, 4, 500)
