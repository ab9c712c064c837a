"""The planner's tile schedules of a dense forward: what was measured, and what is forced."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from statistics import geometric_mean

import fa4_core
import pytest
import torch
from test_plan import LEGAL

from fa4_ext import _library
from kernels.kernel import Kernel, Mask
from scripts.core_problem import core_problem
from tuning import schedules
from tuning.tiles_grid import SM_COUNT, tile

RESULTS = Path(schedules.__file__).parent / "results" / "h200_schedules.csv"
MEASURE = "python -m tuning.schedules --csv tuning/results/h200_schedules.csv, on an H200"
# A schedule that is measured again is up to 1.2 times another of the same problem.
MEAN, MEAN_OF_A_KERNEL, WORST = 1.006, 1.01, 1.2
# The default tile of causal calls at head dim 128.
TILE_128 = next(
    tile(k)
    for k in schedules.kernels()
    if k.head_dim == 128 and k.mask is Mask.CAUSAL and not k.tuned
)


def planned(problem: dict[str, str], forced: tuple[int, int] = (0, 0)) -> fa4_core.Plan:
    """Returns the plan of a row's problem, on its tile."""
    batch, heads, heads_kv, seqlen, head_dim = (
        int(problem[name]) for name in ("batch", "heads", "heads_kv", "seqlen_q", "head_dim")
    )
    lengths = dict(
        batch=batch,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        total_q=batch * seqlen,
        total_k=batch * seqlen,
    )
    core = core_problem(
        LEGAL
        | lengths
        | dict(num_heads=heads, num_heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim)
    )
    core.is_causal = problem["causal"] == "True"
    core.sm_count = SM_COUNT
    overrides = fa4_core.Overrides(
        tile=fa4_core.Tile(*map(int, problem["tile"].split("x"))),
        schedule=fa4_core.TileSchedule(*forced),
    )
    return fa4_core.plan(core, False, overrides)


@cache
def measured() -> dict[tuple[str, ...], dict[tuple[int, int], float]]:
    """Returns microseconds by schedule, by problem."""
    found: dict = {}
    with open(RESULTS, newline="") as file:
        for row in csv.DictReader(file):
            times = found.setdefault(tuple(row[name] for name in schedules.PROBLEM), {})
            times[int(row["num_ctas"]), int(row["paired_heads"])] = float(row["us"])
    return found


@cache
def ratios(kernel: Kernel) -> tuple[dict[tuple[str, ...], float], int]:
    """Returns the planned schedules' times over the fastest's, by problem, and how many problems
    are left out because their schedule or their tile was not measured."""
    found, problems = {}, schedules.problems(kernel)
    for problem in problems:
        key = schedules.key(problem)
        plan, times = planned(key), measured().get(tuple(key.values()), {})
        if (plan.num_ctas, plan.paired_heads) in times:
            found[tuple(key.values())] = times[plan.num_ctas, plan.paired_heads] / min(
                times.values()
            )
    return found, len(problems) - len(found)


@pytest.mark.parametrize("kernel", schedules.kernels(), ids=lambda kernel: kernel.name)
def test_the_planner_schedules_nearly_as_fast_as_the_fastest_that_was_measured(kernel):
    found, unmeasured = ratios(kernel)
    if found:
        worst = max(found, key=found.get)
        assert found[worst] <= WORST, f"{worst}: {found[worst]:.3f} of the fastest's time"
        assert geometric_mean(found.values()) <= MEAN_OF_A_KERNEL
    if unmeasured:
        pytest.skip(f"{unmeasured} problems were not measured: run {MEASURE}")


def test_on_average_the_planner_schedules_as_fast_as_the_fastest_that_was_measured():
    every = [ratios(kernel) for kernel in schedules.kernels()]
    if unmeasured := sum(count for _, count in every):
        pytest.skip(f"{unmeasured} problems were not measured: run {MEASURE}")
    assert geometric_mean(ratio for found, _ in every for ratio in found.values()) <= MEAN


def test_what_the_planner_may_choose_is_measured():
    for kernel, shape in schedules.missing(None):
        plan = planned(schedules.key((kernel, shape)))
        found = schedules.schedules(kernel, shape)
        assert (plan.num_ctas, plan.paired_heads) in found, (kernel.name, shape, found)
        assert all(
            1 <= num_ctas <= SM_COUNT and 0 <= paired_heads <= shape.batch * shape.heads
            for num_ctas, paired_heads in found
        ), found


def test_the_results_are_of_the_grid():
    """Results on a tile that no kernel has any more count for nothing."""
    tiles = {(str(kernel.head_dim), tile(kernel)) for kernel in schedules.kernels()}
    every = {tuple(schedules.key(problem).values()) for problem in schedules.missing(None)}
    current = {problem for problem in measured() if problem[:2] in tiles}
    assert current <= every
    assert len(schedules.missing(RESULTS)) == len(every) - len(current)


@pytest.mark.parametrize("forced", [(1, 0), (7, 3), (SM_COUNT, 16)], ids=str)
def test_a_forced_schedule_is_taken(forced):
    problem = dict(
        batch="1",
        heads="16",
        heads_kv="16",
        seqlen_q="2048",
        head_dim="128",
        tile=TILE_128,
        causal="True",
    )
    plan = planned(problem, forced)
    assert (plan.num_ctas, plan.paired_heads) == forced


def test_a_call_that_a_forced_schedule_does_not_fit_says_why_and_others_are_as_before():
    def explain(causal=True, heads=16):
        query = torch.empty(1, 2048, heads, 128, dtype=torch.bfloat16, device="meta")
        absent = (None,) * 3
        return torch.ops.fa4_ext.explain(
            query,
            query,
            query,
            None,
            None,
            2048,
            2048,
            0.0,
            causal,
            False,
            *absent,
            *(None,) * 4,
            False,
            False,
            True,
            90,
            SM_COUNT,
        )[:3]

    before = explain(causal=False)
    with _library.override(schedule=(SM_COUNT, 16)):
        assert explain()[0]
        assert explain(causal=False) == before
        reason = (
            f"a schedule must have 1 to {SM_COUNT} CTAs and 0 to 8 paired heads, has "
            f"{SM_COUNT} and 16"
        )
        assert explain(heads=8) == (False, "", reason)
    for wrong in ((SM_COUNT + 1, 0), (-1, 0), (1, -1), (0, 3), (0, -1)):
        with _library.override(schedule=wrong):
            assert explain()[2] == (
                f"a schedule must have 1 to {SM_COUNT} CTAs and 0 to 16 paired heads, has "
                f"{wrong[0]} and {wrong[1]}"
            )
    assert explain(heads=8)[0]
