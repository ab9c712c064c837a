"""The order of the persistent forward's tiles: every tile once, and equal loads, for any lengths
and numbers of workers."""

from __future__ import annotations

import heapq
import math

import fa4_core
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts.core_problem import core_problem
from test_plan import LEGAL

from kernels.sm90 import tiles

SM_COUNTS = (1, 2, 7, 78, 114, 132, 144)
BLOCK_N = 128
START = 0.7  # of a block of keys: what a tile costs beside its blocks


def choose(condition, a, b):
    return a if condition else b


def planned(heads: int, seqlen: int, head_dim: int, sm_count: int, **fields) -> fa4_core.Plan:
    lengths = dict(batch=1, seqlen_q=seqlen, seqlen_k=seqlen, total_q=seqlen, total_k=seqlen)
    wanted = dict(
        num_heads=heads, num_heads_kv=heads, head_dim=head_dim, head_dim_v=head_dim, is_causal=True
    )
    problem = core_problem(LEGAL | lengths | wanted | fields)
    problem.sm_count = sm_count
    return fa4_core.plan(problem, False)


def dealt(
    heads: int, blocks: int, workers: int, paired: int, causal: bool
) -> list[list[tuple[int, int]]]:
    """(head, block of queries) of each thread block's tiles, in its order."""
    units, rest, end = tiles.units(blocks), max(heads - paired, 1), tiles.end(heads, paired, blocks)
    workers = min(workers, end)
    found = []
    for worker in range(workers):
        found.append([])
        cursor, flip = tiles.first(worker)
        while cursor < end:
            tile = (
                tiles.causal(cursor, flip, paired, blocks, units, rest, choose)
                if causal
                else tiles.full(cursor, blocks)
            )
            found[-1].append(tile)
            cursor, flip = tiles.following(
                cursor, flip, worker, workers, paired, blocks, units, choose
            )
    return found


def busiest(heads: int, blocks: int, rows: int, workers: int, paired: int) -> float:
    """Blocks of keys of the thread block that has most of them; `rows`: of a tile."""
    found = dealt(heads, blocks, workers, paired, causal=True)
    return max(
        sum((block + 1) * rows / BLOCK_N + START for _, block in tiles_of_worker)
        for tiles_of_worker in found
    )


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.sampled_from(SM_COUNTS),
    st.floats(0, 1),
    st.booleans(),
)
def test_every_tile_is_dealt_once(heads, blocks, workers, share, causal):
    """For any number of paired heads, not only the planner's."""
    paired = int(heads * share) if causal else 0
    found = [
        tile
        for tiles_of_worker in dealt(heads, blocks, workers, paired, causal)
        for tile in tiles_of_worker
    ]
    assert sorted(found) == [(head, block) for head in range(heads) for block in range(blocks)]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(2, 40), st.sampled_from((0, *SM_COUNTS)))
def test_the_planner_deals_to_multiprocessors_in_whole_rounds(heads, blocks, sm_count):
    plan = planned(heads, 128 * blocks, 128, sm_count)
    if plan.kernel.op == fa4_core.Op.DECODE:
        return
    units, multiprocessors = tiles.units(-(-128 * blocks // plan.kernel.block_m)), max(sm_count, 1)
    assert 0 <= plan.paired <= heads
    assert 1 <= plan.workers <= multiprocessors
    found = (heads, blocks, plan.workers, plan.paired)
    if plan.workers < multiprocessors:
        assert plan.paired == heads, found
        assert -(-heads * units // plan.workers) == -(-heads * units // multiprocessors), (
            f"more rounds than necessary: {found}"
        )
    elif 0 < plan.paired < heads:
        rest = (heads - plan.paired) * units
        assert plan.paired * units % multiprocessors == 0 or rest >= 2 * multiprocessors, found


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.integers(2, 16))
def test_the_planner_takes_the_dealing_with_the_least_busy_multiprocessor(heads, blocks):
    """Of those in whole rounds. It looks at a few multiprocessors alone, and counts a head's
    longest tile as a pair."""
    workers, seqlen = 132, 128 * blocks
    plan = planned(heads, seqlen, 128, workers)
    if plan.kernel.op == fa4_core.Op.DECODE:
        return
    rows = plan.kernel.block_m
    blocks = -(-seqlen // rows)
    units = tiles.units(blocks)
    even = workers // math.gcd(workers, units)
    whole_rounds = heads * units // workers * workers // units // even * even
    dealings = [(workers, whole_rounds), (-(-heads * units // -(-heads * units // workers)), heads)]
    loads = {dealing: busiest(heads, blocks, rows, *dealing) for dealing in dealings}
    chosen = busiest(heads, blocks, rows, plan.workers, plan.paired)
    assert chosen <= 1.1 * min(loads.values()), (
        f"{plan.workers} workers, {plan.paired} paired have {chosen}; {loads}"
    )


@pytest.mark.parametrize("seqlen", (512, 1024, 2048, 4096, 8192, 16384))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_loads_are_balanced(head_dim, seqlen):
    """16k tokens, hidden size 2048: what the busiest multiprocessor has beyond the average is idle
    time of the others."""
    heads, workers = 16384 // seqlen * (2048 // head_dim), 132
    plan = planned(heads, seqlen, head_dim, workers)
    rows = plan.kernel.block_m
    blocks = -(-seqlen // rows)
    assert plan.kernel.block_n == BLOCK_N
    loads = [
        sum(-(-min((block + 1) * rows, seqlen) // BLOCK_N) + START for _, block in found)
        for found in dealt(heads, blocks, plan.workers, plan.paired, causal=True)
    ]
    balance = sum(loads) / workers / max(loads)
    assert balance >= 0.965, (
        f"the average is {balance:.3f} of the busiest worker's load, {plan.paired} of {heads} "
        "heads paired"
    )


def loads_without_mask(heads: int, seqlen: int, kernel, workers: int) -> list[float]:
    """Of each thread block, in tiles. Warpgroups of 64 rows share the work of a tile; one without
    rows leaves its share out."""
    blocks = -(-seqlen // kernel.block_m)
    last = math.ceil((seqlen - (blocks - 1) * kernel.block_m) / 64) / (kernel.block_m // 64)
    found = dealt(heads, blocks, workers, 0, causal=False)
    return [
        sum(last if block == blocks - 1 else 1 for _, block in tiles_of_worker)
        for tiles_of_worker in found
    ]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(65, 6000),
    st.sampled_from((64, 96, 128, 256)),
    st.sampled_from(SM_COUNTS),
)
def test_without_a_mask_fewer_thread_blocks_are_never_busier(
    heads, seqlen, head_dim, multiprocessors
):
    plan = planned(heads, seqlen, head_dim, multiprocessors, is_causal=False)
    if plan.kernel.op == fa4_core.Op.DECODE or plan.kernel.block_m == 64:
        return
    assert 1 <= plan.workers <= multiprocessors and plan.paired == 0
    busiest, of_all = (
        max(loads_without_mask(heads, seqlen, plan.kernel, n))
        for n in (plan.workers, multiprocessors)
    )
    assert busiest <= of_all + 1e-9, (
        f"{plan.workers} thread blocks: {busiest:.2f} tiles, {multiprocessors}: {of_all:.2f}"
    )


@pytest.mark.parametrize("seqlen", (512, 577, 1000, 1024, 2048, 4096, 8192, 16384))
def test_loads_are_balanced_without_a_mask(seqlen):
    """16k tokens, head dim 64, 192 rows a tile. 132 thread blocks would be at 0.81 to 0.94 up to
    4k."""
    heads = 16384 // seqlen * 32
    plan = planned(heads, seqlen, 64, 132, is_causal=False)
    loads = loads_without_mask(heads, seqlen, plan.kernel, plan.workers)
    balance = sum(loads) / 132 / max(loads)
    assert balance >= 0.965, (
        f"the average is {balance:.3f} of the busiest thread block's load, of {plan.workers}"
    )


def test_few_heads_are_in_work_at_a_time():
    """A head's keys and values are 4 MB at 8k tokens: those of the paired heads that a round works
    on fit in L2."""
    heads, blocks, workers = 64, 64, 132
    paired = planned(heads, 128 * blocks, 128, workers).paired
    assert paired > heads // 2
    found = dealt(heads, blocks, workers, paired, causal=True)
    rounds = [
        {tile[0] for tiles_of_worker in found for tile in tiles_of_worker[turn : turn + 1]}
        for turn in range(4)
    ]
    assert max(map(len, rounds)) <= 6, rounds


def test_a_problem_of_more_tiles_than_cursors_is_refused():
    problem = dict(
        batch=65_535,
        num_heads=65_535,
        num_heads_kv=65_535,
        seqlen_q=512,
        total_q=65_535 * 512,
        total_k=65_535 * 512,
    )
    plan = planned(1, 512, 64, 132, **problem)
    assert (
        plan.reason
        == "there can be more than 2^30 tiles of queries: 65535 heads of 33553920 queries in 65535 "
        "sequences"
    )


WARP = 32
LENGTHS = st.lists(
    st.one_of(st.integers(0, 3), st.integers(0, 600), st.integers(0, 5000)), min_size=1, max_size=80
)


def in_line(lengths, heads, heads_kv, workers, causal, tile_m=128) -> list[tuple[int, int, int]]:
    """(sequence, head, block of queries) in the order in which schedule.py hands them out;
    `lengths`: queries and keys."""
    found, ratio = [], heads // heads_kv
    for group in range(0, len(lengths), WARP):
        rows, keys = np.array(lengths[group : group + WARP]).T
        blocks = -(-rows // tile_m)
        a_head = int(blocks.sum()) * ratio
        last_heads = int(tiles.last_heads(heads_kv, a_head, workers, choose))
        for head_kv in range(heads_kv - last_heads):
            for lane, count in enumerate(blocks):
                places = range(count * ratio)
                found += [
                    (group + lane, head_kv * ratio + i % ratio, int(count) - 1 - i // ratio)
                    for i in places
                ]
        low, high, each = tiles.levels(blocks, rows, keys, tile_m, causal, np.where)
        level = tiles.next_level(tiles.HIGHEST, low, high, np.max, np.where)
        while level >= 0:
            at_level = tiles.at_level(level, low, high, each, np.where)
            for head in range((heads_kv - last_heads) * ratio, heads):
                for lane, count in enumerate(at_level):
                    found += [
                        (group + lane, head, int(level - low[lane]) if causal else block)
                        for block in range(count)
                    ]
            level = tiles.next_level(level, low, high, np.max, np.where)
    return found


@settings(max_examples=200, deadline=None)
@given(
    LENGTHS,
    st.data(),
    st.sampled_from(((1, 1), (4, 4), (6, 2), (16, 1))),
    st.sampled_from(SM_COUNTS),
    st.booleans(),
)
def test_every_tile_of_packed_sequences_is_in_line_once(rows, data, heads, workers, causal):
    keys = [data.draw(st.sampled_from((length, 0, 777))) for length in rows]
    found = in_line(list(zip(rows, keys, strict=True)), *heads, workers, causal)
    every = [
        (i, head, block)
        for i, length in enumerate(rows)
        for head in range(heads[0])
        for block in range(-(-length // 128))
    ]
    assert sorted(found) == every


def taken(costs: list[float], workers: int) -> float:
    """The time until all are done: a worker takes the next in line when it begins the one it
    has."""
    line = iter(costs)
    # its last one's begin and end
    begun = [(0.0, cost) for cost, _ in zip(line, range(workers), strict=False)]
    heapq.heapify(begun)
    for cost in line:
        _, end = heapq.heappop(begun)
        heapq.heappush(begun, (end, end + cost))
    return max(end for _, end in begun)


@pytest.mark.parametrize("heads", ((16, 16), (32, 8)), ids=str)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("name", ("uniform", "mixed", "one long", "lognormal"))
def test_loads_of_packed_sequences_are_balanced(name, causal, heads):
    lengths = {
        "uniform": [1024] * 16,
        "mixed": [
            256,
            1024,
            512,
            4096,
            128,
            256,
            2048,
            256,
            1024,
            512,
            128,
            256,
            2048,
            256,
            1024,
            512,
            1024,
            128,
            256,
            512,
            128,
        ],
        "one long": [128] * 16 + [14336],
        "lognormal": [int(length) + 1 for length in np.random.default_rng(0).lognormal(6, 1, 100)],
    }[name]
    workers = 132
    line = in_line([(length, length) for length in lengths], *heads, workers, causal)
    costs = [
        -(-(min((block + 1) * 128, lengths[i]) if causal else lengths[i]) // BLOCK_N) + START
        for i, _, block in line
    ]
    balance = sum(costs) / workers / taken(costs, workers)
    assert balance >= 0.96, f"the average is {balance:.3f} of the busiest worker's load"
