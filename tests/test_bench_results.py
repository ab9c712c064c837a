"""The measurements in the repository are results that the command reads, and the documents link to
files that are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import renew
from fa4_ext.bench import results, table
from fa4_ext.bench.grids import GRIDS
from scripts.documents import performance

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OF_BENCH = sorted(
    path for path in RESULTS.glob("*.json") if "throughput" in json.loads(path.read_text())
)


def test_the_ones_of_the_command_are_found():
    assert {"h200_paper.json", "h200_dims.json"} <= {path.name for path in OF_BENCH}


@pytest.mark.parametrize("path", OF_BENCH, ids=lambda path: path.name)
def test_a_result_is_read_and_has_every_problem_of_its_grid(path):
    result = results.load(str(path), "--from")
    grid = GRIDS[result["grid"]]
    # --op may have left one out.
    directions = {row["direction"] for row in result["throughput"]}
    names = [
        f"{shape.name} {direction}"
        for shape in grid.shapes
        for direction in grid.directions
        if direction in directions
    ]
    assert sorted(row["name"] for row in result["throughput"]) == sorted(names)
    shapes = {shape.name: shape for shape in grid.shapes}
    for row in result["throughput"]:
        shape = shapes[row["name"].removesuffix(f" {row['direction']}")]
        fields = (
            "batch",
            "heads",
            "heads_kv",
            "seqlen_q",
            "seqlen_k",
            "head_dim",
            "causal",
            "layout",
        )
        assert {field: row[field] for field in fields} == {
            field: getattr(shape, field) for field in fields
        }
    assert re.fullmatch(r"[0-9a-f]{40}", result["header"]["build"]["commit"]), (
        "the commit of a clean checkout"
    )
    assert len(list(results.lines(result))) == sum(
        len(row["results"]) for row in result["throughput"]
    )
    assert table.text(result).count("\n") > len(result["throughput"])


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md"])
def test_results_and_figures_that_a_document_names_are_there(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?:benchmarks|tuning)/results/[\w.]+\w", text))
    assert named, f"{document} names none"
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_every_result_has_the_command_that_renews_it():
    found = {path.stem.removeprefix("h200_") for path in RESULTS.glob("*.json")}
    assert found == set(renew.COMMANDS)


def test_the_documents_show_the_results(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["performance", "--check"])
    assert performance.main() == 0, capsys.readouterr().err


def test_every_measured_table_is_shown():
    shown = {
        name
        for path in performance.DOCUMENTS
        for _, name, _ in performance.MARKED.findall(path.read_text())
    }
    assert shown == set(performance.MEASURED)


def test_check_names_a_number_that_is_not_the_results_and_leaves_the_file(
    tmp_path, monkeypatch, capsys
):
    page = tmp_path / "performance.md"
    before = (
        (ROOT / "docs" / "performance.md")
        .read_text()
        .replace("| Llama models, forward | ", "| Llama models, forward | 9", 1)
    )
    page.write_text(before)
    monkeypatch.setattr(performance, "DOCUMENTS", (page,))
    monkeypatch.setattr("sys.argv", ["performance", "--check"])
    assert performance.main() == 1
    assert "-| Llama models, forward | 9" in capsys.readouterr().err
    assert page.read_text() == before


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_performance_md_has_the_commit(path):
    commit = json.loads(path.read_text())["header"]["build"]["commit"]
    rows = [
        line
        for line in (ROOT / "docs" / "performance.md").read_text().splitlines()
        if line.startswith(f"| {path.name}")
    ]
    assert [row.split(" | ")[2] for row in rows] == [commit[:7]]


@pytest.mark.parametrize("name", renew.COMMANDS)
def test_performance_md_has_the_command(name):
    rows = [
        line
        for line in (ROOT / "docs" / "performance.md").read_text().splitlines()
        if line.startswith(f"| h200_{name}.")
    ]
    assert len(rows) == 1
    assert f"`{' '.join(renew.COMMANDS[name])}`" in rows[0]
    written = renew.command(name, Path("results"), "h200")[-2:]
    suffixes = {Path(word.split("=")[1]).suffix for word in written if "=" in word}
    assert suffixes and all(suffix in rows[0].split("|")[1] for suffix in suffixes), (
        suffixes,
        rows[0],
    )


@pytest.mark.parametrize(("module", "done"), [("this", True), ("no_such_module", False)])
def test_renew_says_whether_a_command_ended_well_and_keeps_what_it_printed(
    module, done, monkeypatch, tmp_path
):
    monkeypatch.setattr(renew, "device", lambda: "h200")
    monkeypatch.setitem(renew.COMMANDS, "paper", (module,))
    assert renew.renew("paper", tmp_path, limit_s=60) == done
    assert ("Zen of Python" if done else "No module named no_such_module") in (
        tmp_path / "h200_paper.log"
    ).read_text()
