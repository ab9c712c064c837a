"""The random sample of benchmarks.default_choice, and what the command says about it."""

from __future__ import annotations

import json
import sys
from collections import Counter

import fa4_core
import pytest

from benchmarks import default_choice, random_calls
from benchmarks.random_calls import DIRECTIONS, KINDS, SDPA, VARLEN, Call, sample
from scripts.core_problem import core_problem

CALLS = sample(0, 200)


def planned(call: Call, op: str) -> fa4_core.Plan:
    """Returns the plan of a call's forward or backward. F.scaled_dot_product_attention aligns
    causal masks top-left, the planner bottom-right."""
    seqlen_k, right, causal = call.seqlen_k, -1, call.causal
    if causal and call.seqlen_q < seqlen_k:
        seqlen_k = call.seqlen_q
    elif causal and call.seqlen_q > seqlen_k:
        causal, right = False, call.seqlen_q - seqlen_k
    rows_q, _ = call.rows
    problem = dict(
        op=op, dtype=call.dtype, layout="varlen" if call.lengths else "dense", capability=90,
        batch=call.batch, seqlen_q=call.seqlen_q, seqlen_k=seqlen_k, total_q=rows_q,
        total_k=rows_q if call.lengths else call.batch * seqlen_k, num_heads=call.heads,
        num_heads_kv=call.heads_kv, head_dim=call.head_dim, head_dim_v=call.head_dim_v,
        is_causal=causal, window_size_left=-1, window_size_right=right, deterministic=False,
    )  # fmt: skip
    return fa4_core.plan(core_problem(problem), False)


def test_the_same_seed_gives_the_same_calls_and_another_gives_others():
    assert sample(0, 200) == CALLS
    same = sum(a == b for a, b in zip(sample(1, 200), CALLS, strict=True))
    assert same == 0, f"{same} calls of seed 1 are those of seed 0"


def test_a_longer_sample_begins_with_a_shorter_one():
    assert sample(0, 37) == CALLS[:37]


@pytest.mark.parametrize("seed", range(5))
def test_our_kernels_cover_every_call(seed):
    uncovered = [
        (str(call), op, planned(call, op).reason)
        for call in sample(seed, 200)
        for op in ("forward", "backward")
        if not planned(call, op).supported
    ]
    assert not uncovered, f"{len(uncovered)}, the first: {uncovered[0]}"


def test_the_sample_has_every_kind_of_call():
    kinds = Counter(call.kind for call in CALLS)
    assert set(kinds) == set(KINDS) and min(kinds.values()) >= 20, kinds
    assert {(call.entry, call.direction) for call in CALLS} == {
        (entry, direction) for entry in (SDPA, VARLEN) for direction in DIRECTIONS
    }
    for name, share in {
        "fp16": sum(call.dtype == "fp16" for call in CALLS),
        "grouped heads": sum(call.heads != call.heads_kv for call in CALLS),
        "contiguous": sum(call.contiguous for call in CALLS),
        "causal": sum(call.causal for call in CALLS),
        "causal, fewer queries": sum(
            call.causal and call.seqlen_q < call.seqlen_k for call in CALLS
        ),
        "causal, fewer keys": sum(call.causal and call.seqlen_q > call.seqlen_k for call in CALLS),
        "head dims (192, 128)": sum(
            (call.head_dim, call.head_dim_v) == (192, 128) for call in CALLS
        ),
        "head dims above 128": sum(call.head_dim > 128 for call in CALLS),
        "head dims of no bucket": sum(
            call.head_dim not in (64, 96, 128, 192, 256) for call in CALLS
        ),
        "lengths of 4096 and more": sum(call.seqlen_q >= 4096 for call in CALLS),
    }.items():
        assert share >= 4, f"{name}: {share} of {len(CALLS)}"


@pytest.mark.parametrize("seed", range(5))
def test_a_call_stays_within_the_bounds_of_time_and_memory(seed):
    for call in sample(seed, 200):
        assert call.flops <= random_calls.MAX_FLOPS, (str(call), call.flops)
        assert call.bytes <= random_calls.MAX_BYTES, (str(call), call.bytes)
        assert 1 <= call.seqlen_q <= 2 * random_calls.LONGEST, str(call)
        assert call.batch == (len(call.lengths) or call.batch) and call.batch >= 1, str(call)


def row(number: int, ratio: float, **changes) -> dict:
    timed = {"number": number, "call": f"call {number}", "kind": "packed", "direction": "forward",
             "backend": "cudnn", "our_kernels": ["sm90_forward"], "without_us": 100.0,
             "registered_us": 100 * ratio, "ratio": ratio}  # fmt: skip
    return timed | changes


def test_the_report_names_the_slowest_calls_and_what_ran_them():
    rows = [row(number, 0.5) for number in range(20)]
    rows[3] |= {"ratio": 2.0, "registered_us": 200.0, "our_kernels": [],
                "kernels": {"without": ["cudnn_a"], "registered": ["flash_b"]}}  # fmt: skip
    failed = {"number": 20, "call": "call 20", "kind": "packed", "direction": "forward",
              "error": "out of memory"}  # fmt: skip
    lines = default_choice.report([*rows, failed]).splitlines()
    assert lines[:2] == ["20 calls were measured, 1 failed", "  call 20: out of memory"]
    (of_all,) = (line.split() for line in lines if line.startswith("all "))
    # 2 * 0.5 ** 19, to the power of 1/20
    assert of_all == ["all", "20", "19", "0.536", "2.000", "1"]
    worst = lines[lines.index("the worst 10:") + 1 :]
    assert worst[:4] == [
        "2.000  call 3",
        "       100.0 us without (cudnn), 200.0 us with: none of ours",
        "       without: cudnn_a",
        "       registered: flash_b",
    ]
    assert sum(line.startswith("0.500  call") for line in worst) == 9


def test_a_run_goes_on_where_the_file_stops(tmp_path, monkeypatch):
    path = tmp_path / "some.json"
    measured = []
    monkeypatch.setattr(
        default_choice, "measure", lambda call: measured.append(call) or row(0, 1.0)
    )
    numbered = list(enumerate(CALLS[:5]))
    header = {"build": {"commit": "a" * 40}}
    result = {"header": header, "seed": 0, "rows": []}
    default_choice.run(numbered[:2], result, str(path), 60)
    default_choice.run(numbered[2:], result, str(path), -1)
    assert measured == CALLS[:2], "a spent budget ends the run"
    assert default_choice.earlier_rows(str(path), 0, "a" * 40) == result["rows"]
    assert [path.name for path in tmp_path.iterdir()] == ["some.json"]


@pytest.mark.parametrize(
    ("seed", "commit", "reason"),
    [(1, "a" * 40, "of seed 0, this run of 1"), (0, "b" * 40, f"of commit {'a' * 40}, this run")],
    ids=["seed", "commit"],
)
def test_a_file_of_another_sample_or_build_is_refused(tmp_path, seed, commit, reason):
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"header": {"build": {"commit": "a" * 40}}, "seed": 0, "rows": []}))
    with pytest.raises(ValueError, match=reason):
        default_choice.earlier_rows(str(path), seed, commit)


def test_a_count_of_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["default_choice", "--count", "0"])
    with pytest.raises(SystemExit):
        default_choice.main()
    assert "argument --count: must be at least 1, is 0" in capsys.readouterr().err
