"""The tile rules: what the measurements give, what the planner follows, and the only candidates
that a wheel holds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from itertools import product

import fa4_core
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plan_problems import problems

from fa4_ext import _library
from kernels import matrix, rules
from kernels.kernel import Mask, Op
from kernels.rules import TileRule
from scripts.core_problem import core_problem
from tuning import fit_tiles, tiles, tiles_grid
from tuning import rows as csv_rows
from tuning.fit_tiles import PROBLEMS, UNMEASURED, Row, cells, fit, read, row_of

RULES = rules.tile_rules()
CANDIDATES = [kernel for kernel in matrix.with_candidates() if kernel.tuned]
DENSE = {
    "op": "forward", "dtype": "bf16", "layout": "dense", "capability": 90, "batch": 16,
    "seqlen_q": 1024, "seqlen_k": 1024,
    "total_q": 16384, "total_k": 16384, "num_heads": 32, "num_heads_kv": 32, "head_dim": 64,
    "head_dim_v": 64, "is_causal": True,
    "window_size_left": -1, "window_size_right": -1, "deterministic": False,
}  # fmt: skip
MEASURE = "python -m tuning.tiles --csv tuning/results/h200_tiles.csv, on an H200"
MASKS = {"full": fa4_core.Mask.FULL, "causal": fa4_core.Mask.CAUSAL}


def with_tile_of(kernel: matrix.Kernel) -> fa4_core.Overrides:
    return fa4_core.Overrides(tile=fa4_core.Tile(kernel.block_m, kernel.block_n))


def box(op, layout, mask, block_m, block_n, beats_stock=True, **ranges) -> TileRule:
    """Returns a rule of head dim 64."""
    return TileRule(
        op, layout, 64, mask, block_m=block_m, block_n=block_n, beats_stock=beats_stock,
        **UNMEASURED | ranges,
    )  # fmt: skip


def core_rule(box: TileRule) -> fa4_core.TileRule:
    ranges = (
        (low, 2**63 - 1 if high == math.inf else high)
        for low, high in (box.queries, box.rows, box.tiles)
    )
    op, layout = getattr(fa4_core.Op, box.op.upper()), getattr(fa4_core.Layout, box.layout.upper())
    tile = fa4_core.Tile(box.block_m, box.block_n)
    return fa4_core.TileRule(
        op, layout, box.head_dim, MASKS[box.mask], *ranges, tile, box.beats_stock
    )


counter = itertools.count()


def row(**changes) -> Row:
    """Returns a row of a problem of its own, unless `changes` say which."""
    kind = dict(op="forward", layout="dense", head_dim=64, mask="causal", block_m=128, block_n=128)
    kind |= dict(grouped=False, batch=16, keys=1024)
    features = dict(problem=(str(next(counter)),), queries=1024, rows=88, tiles=2327)
    fields = (
        kind | features | dict(default_tflops=100.0, tuned_tflops=110.0, speedup_over_stock=1.5)
    )
    return Row(**fields | changes)


def tile_of(plan) -> tuple[int, int]:
    return plan.kernel.block_m, plan.kernel.block_n


def test_rules_are_what_the_measurements_give():
    assert fit(read()) == RULES, "run python -m tuning.fit_tiles"


def test_matrix_holds_the_candidates_that_a_rule_names_and_no_others():
    named = {
        (rule.op, rule.layout, rule.head_dim, rule.mask, rule.block_m, rule.block_n)
        for rule in RULES
    }
    held = [kernel for kernel in matrix.matrix() if kernel.tuned]
    keys = {
        (k.op.value, k.layout.value, k.head_dim, k.mask.value, k.block_m, k.block_n) for k in held
    }
    assert keys == named
    assert {
        kernel
        for kernel in matrix.matrix()
        if not kernel.tuned and kernel.op in (Op.FORWARD, Op.BACKWARD)
    } == {
        kernel
        for kernel in matrix.with_candidates()
        if not kernel.tuned and kernel.op in (Op.FORWARD, Op.BACKWARD)
    }
    for kernel in held:
        if kernel.op is Op.BACKWARD:
            assert set(matrix.companions(kernel).present) <= set(matrix.matrix()), kernel.name


def test_a_rule_brings_its_candidate_into_the_matrix(monkeypatch):
    rule = box("backward", "varlen", "full", 96, 128, beats_stock=False)
    monkeypatch.setattr(rules, "tile_rules", lambda: (rule,))
    tuned = [kernel for kernel in matrix.matrix() if kernel.tuned]
    assert {kernel.name for kernel in tuned} == {
        f"sm90_backward_{dtype}_d64_varlen_full_{heads}_m96n128"
        for dtype, heads in product(("bf16", "fp16"), ("mha", "gqa"))
    }
    assert all(set(matrix.companions(kernel).present) <= set(matrix.matrix()) for kernel in tuned)


def test_rules_are_read_as_they_were_written(tmp_path):
    kind = ("forward", "dense", "causal", 128, 128)
    some = (
        box(*kind, problems=2, tuned_tflops=110.5),
        box(*kind, False, queries=(512, 2047), rows=(75, 94), tiles=(400, math.inf)),
    )
    rules.write(TileRule, some, tmp_path / "rules.csv")
    assert rules.read(TileRule, tmp_path / "rules.csv") == some


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(), row(tiles=2000)], [(110.0, 1.1)]),
        ([row()], []),  # one measurement
        ([row(tuned_tflops=102.0)] * 2, []),  # noise
        ([row(tuned_tflops=130.0), row(tuned_tflops=98.0)], []),  # slower on one
        ([row(), row(queries=600, tuned_tflops=90.0)] * 2, [(110.0, 1.1)]),  # slower in another box
        # neighbours that agree
        ([row(), row(queries=2048, tuned_tflops=120.0)] * 2, [(114.9, 1.1)]),
        ([row(), row(queries=4096)] * 2, [(110.0, 1.1)] * 2),  # no neighbours
    ],
    ids=["wins", "once", "noise", "slower", "elsewhere", "neighbours", "apart"],
)
def test_fit(rows, expected):
    assert [(rule.tuned_tflops, rule.worst_speedup) for rule in fit(rows)] == expected


@pytest.mark.parametrize(("shared", "tiles"), [(2, [64]), (1, [64]), (0, [64, 128])])
def test_a_tile_wins_where_no_other_gains_more(shared, tiles):
    rows = [row(problem=(f"{i}",), block_n=64, tuned_tflops=120.0) for i in range(2)]
    rows += [row(problem=(f"{i + 2 - shared}",)) for i in range(2)]
    assert [rule.block_n for rule in fit(rows)] == tiles


@pytest.mark.parametrize(("over_stock", "beats"), [((1.5, 1.01), True), ((1.5, 0.97), False)])
def test_a_rule_says_whether_stock_was_slower_too(over_stock, beats):
    (found,) = fit([row(speedup_over_stock=ratio) for ratio in over_stock])
    assert (found.beats_stock, found.worst_speedup_over_stock) == (beats, min(over_stock))


def features(problem: dict, default_m: int, sm_count: int, candidate: tuple[int, int]) -> Row:
    """Returns the features that csrc/core/plan/problem_features.h computes, in Python."""
    queries = (
        problem["total_q"] // problem["batch"]
        if problem["layout"] == "varlen"
        else problem["seqlen_q"]
    )
    a_head = math.ceil(queries / default_m)
    return row(
        op=problem["op"], layout=problem["layout"],
        mask="causal" if problem["is_causal"] else "full", queries=queries,
        rows=100 * math.ceil(queries / candidate[0]) * candidate[0] // (a_head * default_m),
        tiles=100 * problem["batch"] * problem["num_heads"] * a_head // sm_count,
    )  # fmt: skip


ranges = st.tuples(st.integers(0, 150), st.integers(0, 150)).map(
    lambda bounds: (min(bounds), max(bounds))
)


@st.composite
def boxes(draw) -> TileRule:
    kernel = draw(st.sampled_from([k for k in CANDIDATES if k.head_dim == 64]))
    kind = (kernel.op.value, kernel.layout.value, kernel.mask.value)
    queries = draw(ranges.map(lambda bounds: (8 * bounds[0], 8 * bounds[1])))
    tiles = draw(ranges.map(lambda bounds: (4 * bounds[0], 4 * bounds[1])))
    return box(
        *kind, kernel.block_m, kernel.block_n, draw(st.booleans()),
        queries=queries, rows=draw(ranges), tiles=tiles,
    )  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(
    problems(largest=1000, capabilities=(90,)).filter(lambda p: p["total_q"] >= p["batch"]),
    st.lists(boxes(), max_size=12),
    st.booleans(),
)
def test_planner_follows_the_table(problem, table, self_attention):
    """With any table, the first rule that holds gives the tile, and no rule gives the default's."""
    problem |= {
        "head_dim": 64,
        "head_dim_v": 64,
        "deterministic": False,
        "window_size_left": -1,
        "window_size_right": -1,
    }
    if self_attention:
        problem |= {"seqlen_k": problem["seqlen_q"], "total_k": problem["total_q"]}
    core = core_problem(problem)
    apart = fa4_core.KernelSet(["*_backward_groups_*"])  # which have one tile
    default = fa4_core.plan(core, False, tile_rules=[], disabled=apart)
    assume(default.kernel.op != fa4_core.Op.DECODE)
    mask = "causal" if default.kernel.mask == fa4_core.Mask.CAUSAL else "full"
    same = problem["seqlen_q"] == problem["seqlen_k"] and problem["total_q"] == problem["total_k"]
    expected = tile_of(default)
    for rule in table if same else ():
        tile = (rule.block_m, rule.block_n)
        here = features(problem, default.kernel.block_m, core.sm_count, tile)
        if rule.holds(replace(here, mask=mask)):
            expected = tile
            break
    rules_of_table = [core_rule(rule) for rule in table]
    chosen = fa4_core.plan(core, False, tile_rules=rules_of_table, disabled=apart)
    assert tile_of(chosen) == expected, (problem, table)
    assert chosen.kernel.tuned == (expected != tile_of(default))
    for field in (
        "op",
        "arch",
        "dtype",
        "head_dim",
        "head_dim_v",
        "layout",
        "mask",
        "grouped",
        "deterministic",
    ):
        assert getattr(chosen.kernel, field) == getattr(default.kernel, field), field


@pytest.mark.parametrize("change", [
    {"capability": 100}, {"head_dim": 72}, {"head_dim_v": 128}, {"window_size_left": 100},
    {"seqlen_q": 512, "total_q": 8192},
    {"op": "backward"}, {"op": "backward", "deterministic": True}, {"layout": "varlen"},
    {"is_causal": False},
], ids=str)  # fmt: skip
def test_a_rule_is_for_its_own_kind_of_call(change):
    table = [core_rule(box("forward", "dense", "causal", 128, 128))]
    assert fa4_core.plan(core_problem(DENSE), True, tile_rules=table).kernel.tuned
    assert not fa4_core.plan(core_problem(DENSE | change), True, tile_rules=table).kernel.tuned


def test_deterministic_gradients_keep_the_default_tile():
    table = [core_rule(box("backward", "dense", "causal", 64, 128))]
    plans = [
        fa4_core.plan(
            core_problem(DENSE | {"op": "backward", "deterministic": deterministic}),
            True,
            tile_rules=table,
        )
        for deterministic in (False, True)
    ]
    assert [tile_of(plan) for plan in plans] == [(64, 128), (128, 128)]


@pytest.mark.parametrize("beats_stock", (True, False))
def test_speed_rules_stand_unless_the_tile_beats_stock_too(beats_stock):
    packed = {
        "layout": "varlen",
        "batch": 280,
        "seqlen_q": 150,
        "seqlen_k": 150,
        "total_q": 42000,
        "total_k": 42000,
    }
    short = DENSE | packed | {"op": "backward", "is_causal": False}
    by_default = fa4_core.plan(core_problem(short), True, tile_rules=[])
    assert by_default.reason.startswith("the stock kernel is faster"), by_default.reason
    table = [core_rule(box("backward", "varlen", "full", 64, 128, beats_stock))]
    plan = fa4_core.plan(core_problem(short), True, tile_rules=table)
    assert plan.supported == beats_stock
    assert tile_of(plan) == (64, 128) if beats_stock else plan.reason == by_default.reason


def test_a_tile_that_a_build_lacks_is_the_default():
    table = [core_rule(box("forward", "dense", "causal", 320, 128))]
    plan = fa4_core.plan(core_problem(DENSE), True, tile_rules=table)
    assert tile_of(plan) == tile_of(fa4_core.plan(core_problem(DENSE), True, tile_rules=[]))


def problem_of(line: dict[str, str]) -> dict:
    longest = int(line["longest"] if line["layout"] == "varlen" else line["seqlen_q"])
    return DENSE | {
        "op": line["direction"], "dtype": line["dtype"], "layout": line["layout"],
        "batch": int(line["batch"]), "seqlen_q": longest,
        "seqlen_k": longest, "total_q": int(line["total_q"]), "total_k": int(line["total_q"]),
        "num_heads": int(line["heads"]),
        "num_heads_kv": int(line["heads_kv"]), "head_dim": int(line["head_dim"]),
        "head_dim_v": int(line["head_dim"]),
        "is_causal": line["causal"] == "True",
    }  # fmt: skip


def test_planner_follows_the_table_on_every_measured_problem():
    """None is slower than with the default tile, but for noise. A problem that runs on a tile which
    was not measured beside today's default is left out, and named."""
    measured, slower, unmeasured = {}, [], []
    for line in fit_tiles.lines():
        speedups = measured.setdefault(tuple(problem_of(line).items()), {line["default_tile"]: 1.0})
        speedups[line["tile"]] = row_of(line).speedup
    for problem, speedups in measured.items():
        kernel = fa4_core.plan(core_problem(dict(problem)), False).kernel
        if kernel.op in (fa4_core.Op.DECODE, fa4_core.Op.BACKWARD_GROUPS):
            continue
        speedup = speedups.get(f"{kernel.block_m}x{kernel.block_n}")
        if speedup is None:
            unmeasured.append(kernel.name)
        elif speedup < 0.985:
            slower.append((problem, kernel.name, speedups))
    assert not slower, f"{len(slower)} of {len(measured)} problems, the first: {slower[0]}"
    if unmeasured or not measured:
        pytest.skip(f"{len(unmeasured)} problems run on tiles that were not measured, the first on "
                    f"{next(iter(unmeasured), 'none')}: run {MEASURE}")  # fmt: skip


def test_what_was_measured_beside_another_default_counts_for_nothing(tmp_path, monkeypatch):
    """So a new default tile needs a new fit, which needs no GPU, and no new measurement."""
    k = next(k for k in tiles_grid.defaults() if k.op is Op.FORWARD)
    monkeypatch.setattr(fit_tiles, "defaults", lambda: [replace(k, block_m=k.block_m + 64)])
    assert fit_tiles.lines() == [] and fit(read()) == ()
    rules.write(TileRule, (), tmp_path / "rules.csv")
    assert rules.read(TileRule, tmp_path / "rules.csv") == ()


@pytest.mark.parametrize(
    "kernel",
    [k for k in CANDIDATES if k.op in (Op.FORWARD, Op.BACKWARD)],
    ids=lambda kernel: kernel.name,
)
def test_a_tile_can_be_forced(kernel):
    core = core_problem(DENSE | {
        "op": kernel.op.value, "dtype": kernel.dtype, "layout": kernel.layout.value,
        "head_dim": kernel.head_dim,
        "head_dim_v": kernel.head_dim_v, "is_causal": kernel.mask is Mask.CAUSAL,
        "num_heads_kv": 8 if kernel.grouped else 32,
    })  # fmt: skip
    plan = fa4_core.plan(core, True, with_tile_of(kernel))
    assert plan.supported and plan.kernel.name == kernel.name, plan.reason
    if kernel.op is Op.BACKWARD:
        assert plan.workspace.rows_q % kernel.block_m == 0 and plan.workspace.rows_q >= 1024


def test_forcing_a_tile_passes_the_decode_kernel_and_the_speed_rules():
    core = core_problem(
        DENSE | {"batch": 1, "seqlen_q": 1, "seqlen_k": 65536, "total_q": 1, "total_k": 65536}
    )
    assert fa4_core.plan(core, True).kernel.op == fa4_core.Op.DECODE
    forced = fa4_core.Overrides(tile=fa4_core.Tile(192, 128))
    assert fa4_core.plan(core, True, forced).kernel.op == fa4_core.Op.FORWARD


@pytest.mark.parametrize("seqlen", (64, 1024))
@pytest.mark.parametrize(("tile", "two_cta"), [((128, 128), False), ((256, 128), True)], ids=str)
def test_a_forced_tile_may_be_a_pairs_where_the_default_is_not_and_back(tile, two_cta, seqlen):
    lengths = {
        "batch": 1,
        "seqlen_q": seqlen,
        "seqlen_k": seqlen,
        "total_q": seqlen,
        "total_k": seqlen,
    }
    core = core_problem(
        DENSE
        | lengths
        | {"capability": 100, "head_dim": 128, "head_dim_v": 128, "is_causal": False}
    )
    kernel = fa4_core.plan(core, overrides=fa4_core.Overrides(tile=fa4_core.Tile(*tile))).kernel
    assert ((kernel.block_m, kernel.block_n), kernel.two_cta) == (tile, two_cta)


def test_calls_get_the_forced_tile_or_a_reason():
    def explain():
        query = torch.empty(16, 1024, 32, 64, dtype=torch.bfloat16, device="meta")
        absent = (None,) * 3
        return torch.ops.fa4_ext.explain(
            query,
            query,
            query,
            None,
            None,
            1024,
            1024,
            0.0,
            True,
            False,
            *absent,
            *(None,) * 4,
            False,
            False,
            True,
            90,
            132,
        )

    with _library.override(tile=(192, 128)):
        assert explain()[:2] == (True, "sm90_forward_bf16_d64_dense_causal_m192n128")
    for queries, keys in ((320, 128), (0, 128), (192, 0)):
        with _library.override(tile=(queries, keys)):
            assert explain()[:3] == (
                False,
                "",
                f"this build has no kernel with a tile of {queries} x {keys} for this",
            )
    assert explain()[0]


def test_the_kernels_that_are_measured_run_the_grid():
    for default, (direction, dtype, shape) in (
        (kernel, problem) for kernel in tiles_grid.defaults() for problem in tiles.grid(kernel)
    ):
        line = tiles.key((direction, dtype, shape))
        core = core_problem(problem_of(line))
        plan = fa4_core.plan(core, overrides=with_tile_of(default))
        assert plan.supported and plan.kernel.mask == MASKS[default.mask.value], (line, plan.reason)


@pytest.mark.parametrize("default", tiles_grid.defaults(), ids=lambda kernel: kernel.name)
def test_the_grid_measures_every_box_twice(default):
    """A box of one measurement makes no rule."""
    times = {
        "default_tile": tiles_grid.tile(default),
        "default_us": 2,
        "us": 1,
        "stock_us": 3,
        "gflop": 1,
    }
    rows = [
        row_of(
            tiles.key(problem)
            | {name: str(value) for name, value in times.items()}
            | {"tile": tiles_grid.tile(candidate)}
        )
        for problem in tiles.grid(default)
        for candidate in matrix.candidates(default)
    ]
    once = [box for box, measured in cells(rows).items() if len(measured) < PROBLEMS]
    assert not once, f"{len(once)}, the first: {once[0]}"


def test_a_later_run_measures_what_is_missing(tmp_path):
    everything = tiles.missing(None)
    csv_rows.add(
        [tiles.key(problem) | {"us": 1.0} for _, problem in everything[:10]],
        str(tmp_path / "some.csv"),
    )
    left = [problem for _, problem in tiles.missing(str(tmp_path / "some.csv"))]
    assert len(left) == len(everything) - 10
    assert set(left) == {problem for _, problem in everything[10:]}
