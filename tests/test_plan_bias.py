"""The planner's answers for problems with a bias: which kernels run, in which order and with which
scratch memory, or why none does."""

from __future__ import annotations

import fa4_core
import pytest
from hypothesis import given, settings
from plan_problems import biased_problems
from test_plan import LEGAL, ROWS, describe, end_of, plan, smallest_bucket

from kernels.sm90.bias import CELL, HEADER
from scripts.core_problem import core_problem

BACKWARD = {"op": "backward"}
BIAS = {"bias": (1, 1)}
ANY = (0, 2**62)


def tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def bytes_of_lists(problem: dict, count: int, entries: int) -> int:
    batch, heads = problem["bias"]
    return 4 * batch * heads * count * (HEADER + entries)


def maps_of(problem: dict, chosen) -> dict[str, tuple[int, int]]:
    """Returns offset and size of what the maps write, by name."""
    w, kernel = chosen.workspace, chosen.kernel
    (batch, heads), queries, keys = problem["bias"], problem["seqlen_q"], problem["seqlen_k"]
    by_queries = ROWS[kernel.map_queries]
    rows = queries if problem.get("bias_by_query", True) else 1
    cells = 4 * batch * heads * tiles(rows, CELL) * tiles(keys, CELL)
    lists_q = tiles(rows, by_queries.block_m), tiles(keys, by_queries.block_n)
    found = {
        "cells": (w.cells, cells),
        "lists_q": (w.lists_q, bytes_of_lists(problem, *lists_q)),
    }
    if kernel.map_keys >= 0:
        by_keys = ROWS[kernel.map_keys]
        lists_k = tiles(keys, by_keys.block_n), tiles(queries, by_keys.block_m)
        found["lists_k"] = (w.lists_k, bytes_of_lists(problem, *lists_k))
    return found


@settings(max_examples=300, deadline=None)
@given(biased_problems())
def test_a_bias_gets_the_smallest_bucket_of_its_own_kernels(problem):
    """One pair of kernels runs the backward of every ratio of heads, and is deterministic."""
    chosen = plan(problem)
    assert chosen.supported, (problem, chosen.reason)
    kernel = chosen.kernel
    assert (kernel.head_dim, kernel.head_dim_v) == smallest_bucket(problem)
    assert (kernel.mask, kernel.layout) == (fa4_core.Mask.BIAS, fa4_core.Layout.DENSE)
    backward = problem["op"] == "backward"
    assert kernel.op == (fa4_core.Op.BACKWARD_KEYS if backward else fa4_core.Op.FORWARD)
    assert kernel.dtype.name == problem["dtype"].upper() and not kernel.tuned
    assert chosen.window_size_left == chosen.window_size_right == fa4_core.UNBOUNDED
    by_queries = ROWS[kernel.preprocess] if backward else kernel
    assert by_queries.mask == fa4_core.Mask.BIAS
    for row, op, of in (
        (kernel.map_queries, fa4_core.Op.MAP_QUERIES, by_queries),
        (kernel.map_keys, fa4_core.Op.MAP_KEYS, kernel),
    ):
        if row < 0:
            assert op == fa4_core.Op.MAP_KEYS and not backward
            continue
        found = ROWS[row]
        assert (found.op, found.dtype) == (op, kernel.dtype)
        assert (found.block_m, found.block_n) == (of.block_m, of.block_n)


@settings(max_examples=300, deadline=None)
@given(biased_problems(largest=2**26))
def test_the_workspace_holds_delta_and_the_maps_and_nothing_is_cleared(problem):
    chosen = plan(problem)
    if not chosen.supported:
        assert "less than 2^30" in chosen.reason or "more than 2^30" in chosen.reason, chosen.reason
        return
    w = chosen.workspace
    parts = maps_of(problem, chosen)
    if problem["op"] == "backward":
        parts["delta"] = (w.delta, 4 * problem["total_q"] * problem["num_heads"])
    end = end_of(parts)
    assert end <= w.bytes < end + 256
    assert w.zeroed == w.bytes


@settings(max_examples=100, deadline=None)
@given(biased_problems())
def test_the_order_of_tiles_does_not_depend_on_the_keys(problem):
    problem |= {"op": "forward"}
    square = {"seqlen_k": problem["seqlen_q"], "total_k": problem["total_q"]}
    chosen, other = plan(problem), plan(problem | square)
    assert (chosen.num_ctas, chosen.paired_heads) == (other.num_ctas, other.paired_heads)
    assert 1 <= chosen.num_ctas <= 132
    assert 0 <= chosen.paired_heads <= problem["batch"] * problem["num_heads"]


def test_tiles_go_in_pairs_as_under_a_causal_mask():
    long = {"seqlen_q": 8192, "seqlen_k": 8192, "total_q": 16384, "total_k": 16384}
    biased, causal = plan(LEGAL | long | BIAS), plan(LEGAL | long | {"is_causal": True})
    assert biased.kernel.block_m == causal.kernel.block_m
    assert (biased.num_ctas, biased.paired_heads) == (causal.num_ctas, causal.paired_heads)
    assert biased.paired_heads > 0


@pytest.mark.parametrize("op", ("forward", "backward"))
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_causal": True}, "attn_bias with is_causal not supported"),
        ({"window_size_left": 100}, "attn_bias with a window not supported"),
        ({"window_size_right": 0}, "attn_bias with a window not supported"),
        ({"layout": "varlen"}, "attn_bias with packed sequences (cum_seq_q) not supported"),
        ({"keys_in_use": True}, "attn_bias with seqused_k not supported"),
        ({"num_splits": 2}, "attn_bias with SplitKV (num_splits) not supported"),
        ({"bias": (3, 1)}, "attn_bias must have 1 or 2 batch entries, has 3"),
        ({"bias": (2, 4)}, "attn_bias must have 1 or 8 heads, has 4"),
        (
            {"capability": 100},
            "attn_bias is not supported on compute capability 10.0 in this build",
        ),
        (
            {"capability": 103},
            "attn_bias is not supported on compute capability 10.3 in this build",
        ),
        (
            {"head_dim": 264, "head_dim_v": 264},
            "head_dim must be at most 256 on compute capability 9.0 in this build, is 264",
        ),
    ],
)
def test_a_reason_says_what_a_bias_does_not_go_with(change, reason, op):
    chosen = plan(LEGAL | BIAS | {"op": op} | change)
    assert not chosen.supported
    assert chosen.reason == reason


def test_pages_have_no_bias():
    chosen = plan(LEGAL | BIAS | {"layout": "dense", "page_size": 64})
    assert chosen.reason == "attn_bias with paged KV (block_table) not supported"


@pytest.mark.parametrize("seqlen_q", (1, 16, 64))
def test_few_queries_with_a_bias_are_not_decoded(seqlen_q):
    lengths = {"seqlen_q": seqlen_q, "total_q": 2 * seqlen_q, "seqlen_k": 8192, "total_k": 16384}
    assert plan(LEGAL | lengths).kernel.op == fa4_core.Op.DECODE
    everywhere = fa4_core.Overrides(decode=fa4_core.Decode.WHERE_POSSIBLE)
    for overrides in (fa4_core.Overrides(), everywhere):
        chosen = fa4_core.plan(core_problem(LEGAL | lengths | BIAS), False, overrides)
        assert chosen.kernel.mask == fa4_core.Mask.BIAS, describe(chosen)


@pytest.mark.parametrize("op", ("forward", "backward"))
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"bias": (2, 8)}, "cuDNN is faster where each head has a bias of its own"),
        ({"bias": (2, 8), "bias_by_query": False}, None),
        ({"bias": (2, 8), "head_dim": 256, "head_dim_v": 256}, None),
        ({"seqlen_q": 8, "total_q": 16}, None),
        ({"seqlen_q": 7, "total_q": 14}, "cuDNN is faster with a bias for this few queries"),
        ({"seqlen_k": 129, "total_k": 258}, None),
        ({"seqlen_k": 128, "total_k": 256}, "cuDNN is faster with a bias for this few keys"),
    ],
)
def test_cudnn_keeps_what_it_is_faster_at(change, reason, op):
    long = {"seqlen_q": 1024, "seqlen_k": 1024, "total_q": 2048, "total_k": 2048}
    problem = LEGAL | long | BIAS | {"op": op, "peer": "cudnn"} | change
    chosen = plan(problem, speed_rules=True)
    assert (chosen.reason or None) == reason and chosen.supported == (reason is None)
    assert plan(problem).supported
    # cuDNN faults on these.
    assert plan(problem | {"bias_suits_cudnn": False}, speed_rules=True).supported


@pytest.mark.parametrize("op", ("forward", "backward"))
@pytest.mark.parametrize("peer", ("flash", "cudnn"))
def test_rules_of_any_mask_do_not_hold_for_a_bias(op, peer):
    problem = LEGAL | {"op": op, "peer": peer}
    kind = {"BACKWARD": fa4_core.Op.BACKWARD, "FORWARD": fa4_core.Op.FORWARD}[op.upper()]

    def left(change: dict, mask) -> bool:
        rule = fa4_core.SpeedRule(
            kind, fa4_core.Layout.DENSE, 128, mask, None, None, None, ANY, ANY, ANY
        )
        return fa4_core.stock_is_faster(core_problem(problem | change), [rule]) is not None

    # As many queries as are not decoded.
    many = {"batch": 8, "total_q": 4096, "total_k": 4096}
    assert left(many, None) and left(many, fa4_core.Mask.FULL)
    assert not left(many | BIAS, None) and not left(many | BIAS, fa4_core.Mask.FULL)
    assert left(many | BIAS, fa4_core.Mask.BIAS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"num_heads": 2**29, "num_heads_kv": 2**29, "seqlen_q": 2**29, "seqlen_k": 2**29}
            | {"batch": 1, "total_q": 2**29, "total_k": 2**29, "bias": (1, 2**29)},
            "workspace must have less than 2^62 bytes, has more for 1 sequences of 536870912 heads",
        ),
        (
            {"batch": 2**31, "bias": (2**31, 1)},
            "attn_bias must have less than 2^31 batch entries, has 2147483648",
        ),
    ],
)
@pytest.mark.parametrize("op", ("forward", "backward"))
def test_maps_that_cannot_be_addressed_are_turned_down(change, reason, op):
    chosen = plan(LEGAL | {"op": op} | change)
    assert not chosen.supported and reason in chosen.reason, describe(chosen)
