"""Checks the order of the persistent forward's tiles: every tile once, and equal loads, for any
lengths and numbers of CTAs."""

from __future__ import annotations

import heapq
import math

import fa4_core
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import LEGAL

from kernels.sm90 import tiles
from scripts.core_problem import core_problem

SM_COUNTS = (1, 2, 7, 78, 114, 132, 144)
BLOCK_N = 128
START = 0.7  # of a key block: what a tile costs beside its key blocks


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


def scheduled(
    heads: int, blocks: int, num_ctas: int, paired_heads: int, causal: bool
) -> list[list[tuple[int, int]]]:
    """Returns (head, query tile) of each CTA's tiles, in its order."""
    units, rest, end = (
        tiles.units(blocks),
        max(heads - paired_heads, 1),
        tiles.end(heads, paired_heads, blocks),
    )
    num_ctas = min(num_ctas, end)
    found = []
    for cta in range(num_ctas):
        found.append([])
        cursor, flip = tiles.first(cta)
        while cursor < end:
            tile = (
                tiles.causal(cursor, flip, paired_heads, blocks, units, rest, choose)
                if causal
                else tiles.full(cursor, blocks)
            )
            found[-1].append(tile)
            cursor, flip = tiles.following(
                cursor, flip, cta, num_ctas, paired_heads, blocks, units, choose
            )
    return found


def busiest(heads: int, blocks: int, rows: int, num_ctas: int, paired_heads: int) -> float:
    """Returns the key blocks of the CTA that has most of them, for tiles of `rows` rows."""
    found = scheduled(heads, blocks, num_ctas, paired_heads, causal=True)
    return max(
        sum((block + 1) * rows / BLOCK_N + START for _, block in tiles_of_cta)
        for tiles_of_cta in found
    )


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.sampled_from(SM_COUNTS),
    st.floats(0, 1),
    st.booleans(),
)
def test_every_tile_is_scheduled_once(heads, blocks, num_ctas, share, causal):
    """It holds for any number of paired heads, not only the planner's."""
    paired_heads = int(heads * share) if causal else 0
    found = [
        tile
        for tiles_of_cta in scheduled(heads, blocks, num_ctas, paired_heads, causal)
        for tile in tiles_of_cta
    ]
    assert sorted(found) == [(head, block) for head in range(heads) for block in range(blocks)]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(2, 40), st.sampled_from((0, *SM_COUNTS)))
def test_the_planner_schedules_whole_waves_of_sms(heads, blocks, sm_count):
    plan = planned(heads, 128 * blocks, 128, sm_count)
    if plan.kernel.op == fa4_core.Op.DECODE:
        return
    units, sms = tiles.units(-(-128 * blocks // plan.kernel.block_m)), max(sm_count, 1)
    assert 0 <= plan.paired_heads <= heads
    assert 1 <= plan.num_ctas <= sms
    found = (heads, blocks, plan.num_ctas, plan.paired_heads)
    if plan.num_ctas < sms:
        assert plan.paired_heads == heads, found
        assert -(-heads * units // plan.num_ctas) == -(-heads * units // sms), (
            f"more rounds than necessary: {found}"
        )
    elif 0 < plan.paired_heads < heads:
        rest = (heads - plan.paired_heads) * units
        assert plan.paired_heads * units % sms == 0 or rest >= 2 * sms, found


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.integers(2, 16))
def test_the_planner_takes_the_schedule_with_the_least_busy_sm(heads, blocks):
    """The schedules come in whole waves. The planner looks at a few SMs alone, and counts a head's
    longest tile as a pair."""
    num_ctas, seqlen = 132, 128 * blocks
    plan = planned(heads, seqlen, 128, num_ctas)
    if plan.kernel.op == fa4_core.Op.DECODE:
        return
    rows = plan.kernel.block_m
    blocks = -(-seqlen // rows)
    units = tiles.units(blocks)
    even = num_ctas // math.gcd(num_ctas, units)
    whole_waves = heads * units // num_ctas * num_ctas // units // even * even
    schedules = [
        (num_ctas, whole_waves),
        (-(-heads * units // -(-heads * units // num_ctas)), heads),
    ]
    loads = {schedule: busiest(heads, blocks, rows, *schedule) for schedule in schedules}
    chosen = busiest(heads, blocks, rows, plan.num_ctas, plan.paired_heads)
    assert chosen <= 1.1 * min(loads.values()), (
        f"{plan.num_ctas} CTAs, {plan.paired_heads} paired heads have {chosen}; {loads}"
    )


@pytest.mark.parametrize("seqlen", (512, 1024, 2048, 4096, 8192, 16384))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_loads_are_balanced(head_dim, seqlen):
    """At 16k tokens and a hidden size of 2048, the other SMs are idle while the busiest one does
    what it has beyond the average."""
    heads, num_ctas = 16384 // seqlen * (2048 // head_dim), 132
    plan = planned(heads, seqlen, head_dim, num_ctas)
    rows = plan.kernel.block_m
    blocks = -(-seqlen // rows)
    block_n = plan.kernel.block_n
    loads = [
        sum(-(-min((block + 1) * rows, seqlen) // block_n) + START for _, block in found)
        for found in scheduled(heads, blocks, plan.num_ctas, plan.paired_heads, causal=True)
    ]
    balance = sum(loads) / num_ctas / max(loads)
    assert balance >= 0.965, (
        f"the average is {balance:.3f} of the busiest CTA's load, {plan.paired_heads} of {heads} "
        "heads paired"
    )


def loads_without_mask(heads: int, seqlen: int, kernel, num_ctas: int) -> list[float]:
    """Returns the load of each CTA, in tiles. Warpgroups of 64 rows share the work of a tile; one
    without rows leaves its share out."""
    blocks = -(-seqlen // kernel.block_m)
    last = math.ceil((seqlen - (blocks - 1) * kernel.block_m) / 64) / (kernel.block_m // 64)
    found = scheduled(heads, blocks, num_ctas, 0, causal=False)
    return [
        sum(last if block == blocks - 1 else 1 for _, block in tiles_of_cta)
        for tiles_of_cta in found
    ]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(65, 6000),
    st.sampled_from((64, 96, 128, 256)),
    st.sampled_from(SM_COUNTS),
)
def test_without_a_mask_fewer_ctas_are_never_busier(heads, seqlen, head_dim, sm_count):
    plan = planned(heads, seqlen, head_dim, sm_count, is_causal=False)
    if plan.kernel.op == fa4_core.Op.DECODE or plan.kernel.block_m == 64:
        return
    assert 1 <= plan.num_ctas <= sm_count and plan.paired_heads == 0
    busiest, of_all = (
        max(loads_without_mask(heads, seqlen, plan.kernel, n)) for n in (plan.num_ctas, sm_count)
    )
    assert busiest <= of_all + 1e-9, (
        f"{plan.num_ctas} CTAs: {busiest:.2f} tiles, {sm_count}: {of_all:.2f}"
    )


@pytest.mark.parametrize("seqlen", (512, 577, 1000, 1024, 2048, 4096, 8192, 16384))
def test_loads_are_balanced_without_a_mask(seqlen):
    """There are 16k tokens, head dim 64 and 192 rows a tile. 132 CTAs would be at 0.81 to 0.94 up
    to 4k."""
    heads = 16384 // seqlen * 32
    plan = planned(heads, seqlen, 64, 132, is_causal=False)
    loads = loads_without_mask(heads, seqlen, plan.kernel, plan.num_ctas)
    balance = sum(loads) / 132 / max(loads)
    assert balance >= 0.965, (
        f"the average is {balance:.3f} of the busiest CTA's load, of {plan.num_ctas}"
    )


def test_few_heads_are_in_work_at_a_time():
    """A head's keys and values are 4 MB at 8k tokens: those of the paired heads that a wave works
    on fit in L2."""
    heads, seqlen, num_ctas = 64, 8192, 132
    plan = planned(heads, seqlen, 128, num_ctas)
    paired_heads, blocks = plan.paired_heads, -(-seqlen // plan.kernel.block_m)
    assert paired_heads > heads // 2
    found = scheduled(heads, blocks, num_ctas, paired_heads, causal=True)
    waves = [
        {tile[0] for tiles_of_cta in found for tile in tiles_of_cta[wave : wave + 1]}
        for wave in range(4)
    ]
    assert max(map(len, waves)) <= 6, waves


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


def in_line(lengths, heads, heads_kv, num_ctas, causal, tile_m=128) -> list[tuple[int, int, int]]:
    """Returns (sequence, head, query tile) in the order in which schedule.py takes them, for
    sequences of these many queries and keys."""
    found, ratio = [], heads // heads_kv
    for group in range(0, len(lengths), WARP):
        rows, keys = np.array(lengths[group : group + WARP]).T
        blocks = -(-rows // tile_m)
        a_head = int(blocks.sum()) * ratio
        last_heads = int(tiles.last_heads(heads_kv, a_head, num_ctas, choose))
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
def test_every_tile_of_packed_sequences_is_in_line_once(rows, data, heads, num_ctas, causal):
    keys = [data.draw(st.sampled_from((length, 0, 777))) for length in rows]
    found = in_line(list(zip(rows, keys, strict=True)), *heads, num_ctas, causal)
    every = [
        (i, head, block)
        for i, length in enumerate(rows)
        for head in range(heads[0])
        for block in range(-(-length // 128))
    ]
    assert sorted(found) == every


def taken(costs: list[float], num_ctas: int) -> float:
    """Returns the time until all are done. A CTA takes the next in line when it begins the one that
    it has."""
    line = iter(costs)
    # Each CTA's entry is its last one's begin and end.
    begun = [(0.0, cost) for cost, _ in zip(line, range(num_ctas), strict=False)]
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
    num_ctas = 132
    line = in_line([(length, length) for length in lengths], *heads, num_ctas, causal)
    costs = [
        -(-(min((block + 1) * 128, lengths[i]) if causal else lengths[i]) // BLOCK_N) + START
        for i, _, block in line
    ]
    balance = sum(costs) / num_ctas / taken(costs, num_ctas)
    assert balance >= 0.96, f"the average is {balance:.3f} of the busiest CTA's load"
