"""The speed rules: fitted to the measurements that are in the repository, and read by the planner
as they were fitted. Each is about one peer, by whose op a call comes in and who gets it back."""

from __future__ import annotations

import math
from dataclasses import replace

import fa4_core
import pytest

from kernels import rules
from kernels.kernel import HEAD_DIM_BUCKETS
from kernels.rules import Rule
from scripts.core_problem import core_problem
from tuning import cudnn_grid
from tuning import rows as csv_rows
from tuning.fit_cudnn import fit_cudnn
from tuning.fit_stock import NOISE, fit
from tuning.stock import PEERS, key, missing
from tuning.stock_rows import MEASURED, Row, lines, read, row_of

ROWS = read()
RULES = rules.speed_rules()
MASKS = {"full": fa4_core.Mask.FULL, "causal": fa4_core.Mask.CAUSAL}


def measured_problem(peer: str, line: dict[str, str]) -> dict:
    varlen, causal = line["layout"] == "varlen", line["causal"] == "True"
    batch, total_q = int(line["batch"]), int(line["total_q"])
    queries, keys = (int(line["longest" if varlen else name]) for name in ("seqlen_q", "seqlen_k"))
    top_left = causal and peer == "cudnn"
    if top_left:
        keys = min(queries, keys)
    return {
        "peer": peer, "op": line["direction"], "dtype": "bf16", "layout": line["layout"],
        "capability": 90, "batch": batch, "seqlen_q": queries, "seqlen_k": keys,
        "total_q": total_q, "total_k": total_q if varlen else batch * keys,
        "num_heads": int(line["heads"]), "num_heads_kv": int(line["heads_kv"]),
        "head_dim": int(line["head_dim"]),
        "head_dim_v": int(line.get("head_dim_v", line["head_dim"])),
        "is_causal": causal, "causal_top_left": top_left,
        "window_size_left": -1, "window_size_right": -1, "deterministic": False,
    }  # fmt: skip


def measured_problems() -> list[dict]:
    return [measured_problem(peer, line) for peer in MEASURED for line in lines(peer)]


def test_rules_are_what_the_measurements_give():
    assert fit(ROWS) == RULES, "run python -m tuning.fit_stock"


def test_rules_are_read_as_they_were_written(tmp_path):
    rules.write(Rule, RULES, tmp_path / "rules.csv")
    assert rules.read(Rule, tmp_path / "rules.csv") == RULES


def runs_in_groups(plan) -> bool:
    """Whether the kernel of groups runs, which is faster, and was not among what was measured."""
    return plan.kernel.op == fa4_core.Op.BACKWARD_GROUPS


@pytest.mark.parametrize(
    ("op", "layout"),
    [(op, layout) for op in ("forward", "backward") for layout in ("dense", "varlen")],
)
def test_planner_applies_the_rules_to_every_problem_that_was_measured_against_flash(op, layout):
    wrong, slower = [], []
    for row, problem in zip(ROWS, measured_problems(), strict=True):
        if (row.peer, row.op, row.layout) != ("flash", op, layout):
            continue
        plan = fa4_core.plan(core_problem(problem), True)
        # The rules were measured with the default tile; tests/test_tile_rules.py has the others.
        if plan.supported and (plan.kernel.tuned or runs_in_groups(plan)):
            continue
        if plan.supported == any(rule.holds(row) for rule in RULES):
            wrong.append((row, plan.reason))
        if plan.supported and row.ratio > 1.05:
            slower.append(row)
    assert not wrong, f"{len(wrong)} problems, the first: {wrong[0]}"
    if op == "forward":  # A forward has no rules.
        measured = [row.ratio for row in ROWS if (row.peer, row.op) == ("flash", "forward")]
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


def test_planner_applies_the_rules_to_every_problem_that_was_measured_against_cudnn():
    wrong = []
    for row, problem in zip(ROWS, measured_problems(), strict=True):
        if row.peer == "cudnn":
            plan = fa4_core.plan(core_problem(problem), True)
            if plan.supported and runs_in_groups(plan):
                continue
            if plan.supported == any(rule.holds(row) for rule in RULES):
                wrong.append((row, plan.reason))
    assert not wrong, f"{len(wrong)} problems, the first: {wrong[0]}"


def cudnn_row(ratio: float, **changes) -> Row:
    """Returns a made-up measurement against cuDNN: four queries, head dim 64."""
    of_decoding = dict(
        op="decode", layout="dense", head_dim=64, head_dim_v=64, mask="full", grouped=True,
        peer="cudnn", batch=16, queries=4, keys=1024,
    )  # fmt: skip
    return Row(**of_decoding | changes, ratio=ratio)


def boxes(rows: list[Row]) -> set[tuple]:
    """Returns the queries, keys and batch of each fitted rule."""
    return {(rule.queries, rule.keys, rule.batch) for rule in fit_cudnn(rows)}


def test_cudnn_gets_the_box_half_way_to_the_problems_that_ours_runs_as_fast():
    rows = [cudnn_row(1.3 if keys == 1024 else 0.9, keys=keys) for keys in (64, 1024, 16384)]
    (rule,) = fit_cudnn(rows)
    assert (rule.op, rule.peer, rule.mask, rule.grouped) == ("decode", "cudnn", None, True)
    assert (rule.queries, rule.keys, rule.batch) == (rules.ANY, (257, 4096), rules.ANY)


def test_a_box_is_bounded_in_the_number_by_which_a_win_differs_most():
    rows = [cudnn_row(1.3, keys=1024, batch=16), cudnn_row(0.9, keys=512, batch=1)]
    assert boxes(rows) == {(rules.ANY, rules.ANY, (5, math.inf))}


def test_a_box_holds_every_loss_that_no_win_keeps_out():
    rows = [cudnn_row(1.3, keys=keys, batch=batch) for keys in (64, 1024) for batch in (1, 16)]
    rows += [cudnn_row(0.9, keys=16384, batch=batch) for batch in (1, 16)]
    assert boxes(rows) == {(rules.ANY, (0, 4096), rules.ANY)}


def test_a_tie_neither_bounds_a_box_nor_makes_one():
    rows = [cudnn_row(1.3, keys=1024), cudnn_row(1.01, keys=64), cudnn_row(0.9, keys=16384)]
    assert boxes(rows) == {(rules.ANY, (0, 4096), rules.ANY)}


def test_one_query_is_cudnns_where_it_is_faster_on_average():
    rows = [cudnn_row(1.2 if keys == 1024 else 0.9, keys=keys, queries=1) for keys in (64, 1024)]
    assert boxes(rows) == {((0, 1), rules.ANY, rules.ANY)}
    slower = [cudnn_row(0.7, keys=16384, queries=1)]
    assert ((0, 1), rules.ANY, rules.ANY) not in boxes(rows + slower)


def test_losses_on_both_sides_of_a_win_get_a_box_each():
    rows = [cudnn_row(0.9 if keys == 1024 else 1.2, keys=keys) for keys in (64, 1024, 16384)]
    assert boxes(rows) == {
        (rules.ANY, (0, 256), rules.ANY),
        (rules.ANY, (4097, math.inf), rules.ANY),
    }


@pytest.mark.parametrize(
    ("ratios", "cudnn_gets_it"),
    [([1.3, 0.9], True), ([1.3, 0.7], False), ([1.02], False), ([1.03], True)],
    ids=str,
)
def test_problems_that_differ_in_heads_alone_count_as_their_mean(ratios, cudnn_gets_it):
    assert bool(fit_cudnn([cudnn_row(ratio) for ratio in ratios])) == cudnn_gets_it
    assert NOISE["cudnn"] == 1.02


def test_a_rule_is_of_one_kind():
    """Kernel, head dims, mask and grouped heads tell kinds apart."""
    slow = cudnn_row(1.3, op="backward", head_dim=192, head_dim_v=128, queries=1024)
    others = [
        replace(slow, ratio=0.9, **change)
        for change in (
            {"op": "forward"}, {"head_dim_v": 192}, {"head_dim": 256, "head_dim_v": 256},
            {"mask": "causal"}, {"grouped": False},
        )
    ]  # fmt: skip
    (rule,) = fit_cudnn([slow, *others])
    assert rule.holds(slow) and not any(rule.holds(other) for other in others), rule
    assert not rule.holds(replace(slow, peer="flash"))


def test_rules_about_cudnn_leave_those_about_flash_as_they_are():
    flash = [row for row in ROWS if row.peer == "flash"]
    about_flash = tuple(rule for rule in RULES if rule.peer == "flash")
    assert about_flash and fit([*flash, cudnn_row(1.3)])[: len(about_flash)] == about_flash
    assert {rule.peer for rule in RULES} <= set(PEERS)


def core_rule(rule: Rule) -> fa4_core.SpeedRule:
    ranges = (
        (low, 2**63 - 1 if high == math.inf else high)
        for low, high in (rule.queries, rule.keys, rule.batch)
    )
    return fa4_core.SpeedRule(
        getattr(fa4_core.Op, rule.op.upper()), getattr(fa4_core.Layout, rule.layout.upper()),
        rule.head_dim, None if rule.mask is None else MASKS[rule.mask], rule.grouped,
        rule.head_dim_v, None if rule.peer is None else getattr(fa4_core.Peer, rule.peer.upper()),
        *ranges,
    )  # fmt: skip


ONE_QUERY = {
    "peer": "cudnn", "op": "forward", "dtype": "bf16", "layout": "dense", "capability": 90,
    "batch": 16, "seqlen_q": 1, "seqlen_k": 8192, "total_q": 16, "total_k": 131072,
    "num_heads": 32, "num_heads_kv": 8, "head_dim": 64, "head_dim_v": 64, "is_causal": False,
    "window_size_left": -1, "window_size_right": -1, "deterministic": False,
}  # fmt: skip
SQUARE = ONE_QUERY | {"seqlen_q": 1024, "seqlen_k": 1024, "total_q": 16384, "total_k": 16384}
WIDE = SQUARE | {"op": "backward", "head_dim": 256, "head_dim_v": 256, "num_heads_kv": 32}
UNEQUAL = SQUARE | {"head_dim": 192, "head_dim_v": 128, "is_causal": True}


@pytest.mark.parametrize(
    ("problem", "rule"),
    [
        (ONE_QUERY, Rule("decode", "dense", 64, grouped=True, peer="cudnn", keys=(4097, 16384))),
        (SQUARE, Rule("forward", "dense", 64, "full", peer="cudnn", batch=(9, 32))),
        (WIDE, Rule("backward", "dense", 256, "full", False, peer="cudnn")),
        (WIDE | {"head_dim": 200, "head_dim_v": 200}, Rule("backward", "dense", 256, peer="cudnn")),
        (UNEQUAL, Rule("forward", "dense", 192, "causal", head_dim_v=128, peer="cudnn")),
    ],
    ids=["one_query", "square", "head_dim_256", "bucket_of_256", "unequal_head_dims"],
)
def test_planner_leaves_to_cudnn_what_came_in_through_its_op(problem, rule):
    def reason(change: dict, **changed) -> str | None:
        made = core_rule(replace(rule, **changed))
        return fa4_core.stock_is_faster(core_problem(problem | change), [made])

    assert reason({}).startswith("cuDNN is faster"), reason({})
    assert reason({"peer": "flash"}) is None
    assert reason({}, peer="flash") is None
    assert reason({}, head_dim=96) is None
    assert reason({}, head_dim_v=96) is None
    assert reason({}, batch=(17, 32)) is None
    assert reason({}, mask="full" if rule.mask == "causal" else "causal") is None
    assert reason({}, grouped=problem["num_heads"] == problem["num_heads_kv"]) is None


def test_a_rule_about_flash_holds_neither_for_one_query_nor_for_a_call_of_cudnns_op():
    rule = Rule("decode", "dense", 64, peer="flash")
    assert fa4_core.stock_is_faster(core_problem(ONE_QUERY | {"peer": "flash"}), [
        core_rule(rule)]) is None  # fmt: skip
    folded = core_rule(Rule("backward", "dense", 128, peer="flash"))
    assert fa4_core.stock_is_faster(core_problem(WIDE | {"peer": "flash"}), [folded])
    assert fa4_core.stock_is_faster(core_problem(WIDE), [folded]) is None


@pytest.mark.parametrize(
    ("queries", "heads_kv", "may_be_left"), [(1, 8, False), (1, 32, True), (2, 8, True)]
)
def test_packed_sequences_of_one_query_stay_where_pytorch_needs_one_in_each(
    queries, heads_kv, may_be_left
):
    """PyTorch's forward then takes the heads of a group for queries, and q's row i for sequence
    i."""
    problem = SQUARE | {
        "peer": "flash", "layout": "varlen", "seqlen_q": queries, "total_q": 9, "seqlen_k": 1,
        "total_k": 16, "num_heads_kv": heads_kv,
    }  # fmt: skip
    reason = fa4_core.stock_is_faster(
        core_problem(problem), [core_rule(Rule("forward", "varlen", 64, peer="flash"))]
    )
    assert (reason is not None) == may_be_left, reason


def test_the_calls_that_cudnn_was_known_to_run_faster_are_measured():
    measured = {
        (call.batch, call.heads, call.heads_kv, call.seqlen_q, call.seqlen_k, call.head_dim)
        for call, _ in cudnn_grid.problems(quick=False)
    }
    known = {(128, 64, 8, 1, 347, 64), (1, 32, 8, 1, 90145, 64), (16, 32, 32, 1, 668, 64)}
    assert known <= measured, known - measured


def test_the_grid_against_cudnn_has_every_bucket_in_both_directions_and_under_both_masks():
    problems = cudnn_grid.problems(quick=False)
    assert len(set(problems)) == len(problems)
    kinds = {
        ((call.head_dim, call.head_dim_v), direction, call.causal) for call, direction in problems
    }
    assert kinds >= {
        (head_dims, direction, causal)
        for head_dims in HEAD_DIM_BUCKETS[90]
        for direction in ("forward", "backward")
        for causal in (False, True)
    }


def test_a_run_against_cudnn_goes_on_where_the_file_stops(tmp_path):
    every = PEERS["cudnn"].problems(True)
    path = str(tmp_path / "some.csv")
    times = {"kernel": "forward", "ours_us": 2.0, "cudnn_us": 1.0, "ours_spread": 0.1}
    csv_rows.add([key(problem) | times for problem in every[:5]], path)
    assert missing(every, path) == every[5:]


def test_a_line_against_cudnn_becomes_a_row():
    call = cudnn_grid.Call(2, 32, 8, 1, 4096, 192, False, head_dim_v=128)
    line = key((call, "forward")) | {"kernel": "decode", "ours_us": "3.0", "cudnn_us": "2.0"}
    assert row_of(line, "cudnn") == Row(
        op="decode", layout="dense", head_dim=192, mask="full", grouped=True, batch=2, queries=1,
        keys=4096, head_dim_v=128, peer="cudnn", ratio=1.5,
    )  # fmt: skip
