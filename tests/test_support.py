"""docs/support.md says what the planner says, and the realistic calls are what their file says."""

from __future__ import annotations

import re
import sys
from collections import Counter

import pytest

import fa4_ext
from scripts.documents import realistic_calls, support
from scripts.documents.planner import ROOT, plan
from scripts.documents.realistic_calls import CALLS, MODELS
from scripts.documents.support_tiles import OPS, head_dim_rows

README = ROOT / "README.md"
needs_sm90 = pytest.mark.skipif(
    90 not in fa4_ext.build_info()["archs"], reason="this build has no kernels for sm90"
)


@needs_sm90
def test_the_page_is_what_the_planner_says(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["support", "--check"])
    assert support.main() == 0, capsys.readouterr().err


@needs_sm90
def test_check_names_the_difference_and_leaves_the_file(tmp_path, monkeypatch, capsys):
    page = tmp_path / "support.md"
    page.write_text(support.PAGE.read_text().replace("| 192x128 |", "| 999x128 |", 1))
    before = page.read_text()
    monkeypatch.setattr(support, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["support", "--check"])
    assert support.main() == 1
    error = capsys.readouterr().err
    assert "| 999x128 |" in error and "run make docs" in error
    assert page.read_text() == before


@pytest.mark.parametrize("op", OPS)
def test_10_3_gets_the_tiles_of_10_0(op):
    assert head_dim_rows(103, op) == head_dim_rows(100, op)


def test_the_list_has_200_distinct_calls_in_the_mix_that_it_states():
    assert len(CALLS) == len(set(CALLS)) == len({call.name for call in CALLS}) == 200
    families, uses = (
        Counter(call.model.family for call in CALLS),
        Counter(call.use for call in CALLS),
    )
    (mix,) = (
        " ".join(part.split())
        for part in realistic_calls.__doc__.split("\n\n")
        if part.startswith("The mix: ")
    )
    stated = re.findall(r"(?:[:,] )([A-Za-z -]+) (\d+)", mix)
    assert {name: int(count) for name, count in stated} == families | uses


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_a_call_is_possible(call):
    assert call.model is MODELS[call.model.name] and call.model.source
    assert call.heads % call.heads_kv == 0 and call.model.heads % call.heads == 0
    for longest, total in ((call.seqlen_q, call.total_q), (call.seqlen_k, call.total_k)):
        if call.layout == "dense":
            assert total == call.batch * longest
        else:
            assert max(longest, call.batch) <= total <= call.batch * longest
    assert call.layout == "varlen" or not call.paged


@pytest.mark.parametrize("capability", support.DEVICES)
def test_every_call_gets_a_kernel_or_a_reason(capability):
    for call in CALLS:
        found = support.verdict(call, capability)
        assert found.runs == (not found.uncovered and not found.slower)
        if not call.dropout_p:
            assert found.runs == plan(call.problem(capability), speed_rules=True).supported, (
                call.name
            )


def test_readme_has_the_shares():
    stated = re.search(
        r"Of the (\d+) calls of public models in scripts/documents/realistic_calls.py, (\d+) run "
        r"on these kernels on Hopper and (\d+) on Blackwell\.",
        " ".join(README.read_text().split()),
    )
    assert stated, "README names no share of realistic calls"
    runs = {
        capability: sum(support.verdict(call, capability).runs for call in CALLS)
        for capability in (90, 100)
    }
    assert tuple(map(int, stated.groups())) == (len(CALLS), runs[90], runs[100])
