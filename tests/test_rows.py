"""What a run of tuning/ has measured is in its file, however the run ends."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from tuning import rows, schedules, stock, stock_grid, tiles

ROOT = Path(__file__).parent.parent


def rows_of(problem: int) -> list[dict]:
    """Returns two rows of each problem. The third problem fails."""
    if problem == 3:
        raise RuntimeError("wrong by a mile")
    return [{"problem": str(problem), "part": part, "us": 1.5, "us_spread": 0.1} for part in "ab"]


def lines(path: Path) -> list[tuple[str, ...]]:
    with open(path, newline="") as file:
        return [tuple(line) for line in csv.reader(file)]


def expected(*problems: int) -> list[tuple[str, ...]]:
    return [
        ("problem", "part", "us"),
        *((str(problem), part, "1.5") for problem in problems for part in "ab"),
    ]


def test_rows_are_kept_without_those_of_a_problem_that_fails(tmp_path, capsys):
    path = tmp_path / "some.csv"
    found = rows.measure([1, 2, 3, 4], rows_of, str, 60, str(path))
    assert [row["problem"] for row in found] == ["1", "1", "2", "2", "4", "4"]
    assert lines(path) == expected(1, 2, 4)
    assert "3: wrong by a mile" in capsys.readouterr().err


def test_a_later_run_adds_to_the_file(tmp_path):
    path = tmp_path / "some.csv"
    for problems in ([1], [2, 4]):
        rows.measure(problems, rows_of, str, 60, str(path))
    assert lines(path) == expected(1, 2, 4)
    assert rows.measured(str(path), ["problem"]) == {("1",), ("2",), ("4",)}


def test_without_a_file_the_rows_are_returned_alone():
    assert len(rows.measure([1, 2], rows_of, str, 60, None)) == 4


def test_a_spent_budget_ends_the_run(tmp_path, capsys):
    assert rows.measure([1, 2], rows_of, str, -1, str(tmp_path / "none.csv")) == []
    assert "the budget of -1 s is spent" in capsys.readouterr().err


def test_any_other_exception_leaves_what_was_measured(tmp_path):
    def interrupted(problem):
        if problem == 4:
            raise KeyboardInterrupt
        return rows_of(problem)

    with pytest.raises(KeyboardInterrupt):
        rows.measure([1, 2, 4, 5], interrupted, str, 60, str(tmp_path / "some.csv"))
    assert lines(tmp_path / "some.csv") == expected(1, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_process_that_is_ended_leaves_what_it_measured(tmp_path, number):
    code = """
import sys, time
from test_rows import rows, rows_of

def slow(problem):
    if problem == 4:
        print("measuring", flush=True)
        time.sleep(60)
    return rows_of(problem)

rows.measure([1, 2, 4], slow, str, 60, sys.argv[1])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "some.csv")]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "FA4_EXT_AUTOREGISTER": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "measuring\n"
        process.send_signal(number)
        assert process.wait(timeout=30) == -number
    assert lines(tmp_path / "some.csv") == expected(1, 2)


@pytest.mark.parametrize(
    ("module", "default"),
    [(module, module.BUDGET_S) for module in (schedules, stock, tiles)],
    ids=["schedules", "stock", "tiles"],
)
@pytest.mark.parametrize("given", [None, 12.5])
def test_every_measurement_takes_a_budget_and_a_file(module, default, given, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(rows.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rows, "session", nullcontext)
    monkeypatch.setattr(
        rows, "measure", lambda problems, rows_of, name, *rest: asked.append(rest) or []
    )
    options = [] if given is None else ["--budget", str(given)]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--csv", str(tmp_path / "some.csv"), *options])
    module.main()
    assert asked == [(given or default, str(tmp_path / "some.csv"))]


def test_stock_measures_the_direction_that_a_file_lacks(tmp_path):
    everything = stock.PEERS["flash"].problems(True)
    assert len(everything) == 2 * len(stock_grid.problems(quick=True))
    assert stock.missing(everything, None) == everything
    rows.add(
        [stock.key(problem) | {"ours_us": 1.0} for problem in everything[:5]],
        str(tmp_path / "some.csv"),
    )
    assert stock.missing(everything, str(tmp_path / "some.csv")) == everything[5:]
