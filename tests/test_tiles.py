"""The order of the persistent forward's tiles: every tile once, and equal loads, for any lengths and numbers of workers."""

from __future__ import annotations

import fa4_core
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_problems import core_problem
from test_plan import LEGAL

from kernels.sm90 import tiles

SM_COUNTS = (1, 2, 7, 78, 114, 132, 144)
BLOCK_N = 128
START = 0.7  # of a block of keys: what a tile costs beside its blocks


def choose(condition, a, b):
    return a if condition else b


def planned(heads: int, seqlen: int, head_dim: int, sm_count: int, **fields) -> fa4_core.Plan:
    lengths = dict(batch=1, seqlen_q=seqlen, seqlen_k=seqlen, total_q=seqlen, total_k=seqlen)
    wanted = dict(num_heads=heads, num_heads_kv=heads, head_dim=head_dim, head_dim_v=head_dim, is_causal=True)
    problem = core_problem(LEGAL | lengths | wanted | fields)
    problem.sm_count = sm_count
    return fa4_core.plan(problem, False)


def dealt(heads: int, blocks: int, workers: int, paired: int, causal: bool) -> list[list[tuple[int, int]]]:
    """(head, block of queries) of each thread block's tiles, in its order."""
    units, rest, end = tiles.units(blocks), max(heads - paired, 1), tiles.end(heads, paired, blocks)
    workers = min(workers, end)
    found = []
    for worker in range(workers):
        found.append([])
        cursor, flip = tiles.first(worker)
        while cursor < end:
            tile = tiles.causal(cursor, flip, paired, blocks, units, rest, choose) if causal else tiles.full(cursor, blocks)
            found[-1].append(tile)
            cursor, flip = tiles.following(cursor, flip, worker, workers, paired, blocks, units, choose)
    return found


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from(SM_COUNTS), st.floats(0, 1), st.booleans())
def test_every_tile_is_dealt_once(heads, blocks, workers, share, causal):
    """For any number of paired heads, not only the planner's."""
    paired = int(heads * share) if causal else 0
    found = [tile for tiles_of_worker in dealt(heads, blocks, workers, paired, causal) for tile in tiles_of_worker]
    assert sorted(found) == [(head, block) for head in range(heads) for block in range(blocks)]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(2, 40), st.sampled_from((0, *SM_COUNTS)))
def test_the_planner_s_pairs_are_of_the_heads_and_leave_a_round(heads, blocks, sm_count):
    plan = planned(heads, 128 * blocks, 128, sm_count)
    if plan.kernel.op == fa4_core.Op.DECODE:
        return
    assert plan.workers == max(sm_count, 1)
    assert 0 <= plan.paired <= heads
    assert plan.paired == 0 or (heads - plan.paired) * tiles.units(blocks) >= sm_count, (plan.paired, heads, blocks)


@pytest.mark.parametrize("seqlen", (512, 1024, 2048, 4096, 8192, 16384))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_loads_are_balanced(head_dim, seqlen):
    """16k tokens, hidden size 2048: what the busiest multiprocessor has beyond the average is idle time of the others."""
    heads, workers = 16384 // seqlen * (2048 // head_dim), 132
    plan = planned(heads, seqlen, head_dim, workers)
    rows = plan.kernel.block_m
    blocks = -(-seqlen // rows)
    assert plan.kernel.block_n == BLOCK_N
    loads = [
        sum(-(-min((block + 1) * rows, seqlen) // BLOCK_N) + START for _, block in found)
        for found in dealt(heads, blocks, workers, plan.paired, causal=True)
    ]
    balance = sum(loads) / workers / max(loads)
    assert balance >= 0.965, f"the average is {balance:.3f} of the busiest worker's load, {plan.paired} of {heads} heads paired"


def test_few_heads_are_in_work_at_a_time():
    """A head's keys and values are 4 MB at 8k tokens: those of the paired heads that a round works on fit in L2."""
    heads, blocks, workers = 64, 64, 132
    paired = planned(heads, 128 * blocks, 128, workers).paired
    assert paired > heads // 2
    found = dealt(heads, blocks, workers, paired, causal=True)
    rounds = [{tile[0] for tiles_of_worker in found for tile in tiles_of_worker[turn : turn + 1]} for turn in range(4)]
    assert max(map(len, rounds)) <= 6, rounds


def test_a_problem_of_more_tiles_than_cursors_is_refused():
    problem = dict(batch=65_535, num_heads=65_535, num_heads_kv=65_535, seqlen_q=512, total_q=65_535 * 512, total_k=65_535 * 512)
    plan = planned(1, 512, 64, 132, **problem)
    assert plan.reason == "there are more than 2^30 tiles of queries: 65535 x 65535 heads of 512 queries"
