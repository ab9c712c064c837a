"""Reads and writes measurements in a CSV file. A run adds what the file lacks until its budget is
spent or it is interrupted."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from fa4_ext.bench.progress import Progress
from fa4_ext.bench.session import NO_DEVICE, session

T = TypeVar("T")


def parser(description: str, budget_s: float) -> argparse.ArgumentParser:
    """Returns the parser of a run's options. The budget is `budget_s` seconds by default."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--csv", metavar="PATH", help="measures what the file lacks, and adds it problem by problem"
    )
    found.add_argument(
        "--budget", metavar="SECONDS", type=float, default=budget_s, help="(default: %(default)s)"
    )
    return found


def measured(path: str | None, names: Iterable[str]) -> set[tuple[str, ...]]:
    """Returns the values of these columns in each row of a file; an empty set if there is no such
    file."""
    if not path or not os.path.exists(path):
        return set()
    names = tuple(names)
    with open(path, newline="") as file:
        return {tuple(line[name] for name in names) for line in csv.DictReader(file)}


def add(rows: list[dict], path: str) -> None:
    """Appends the rows of a problem, without the spread. They are few enough to reach the file in
    one write."""
    columns = [name for name in rows[0] if not name.endswith("_spread")]
    exists = os.path.exists(path)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if not exists:
            writer.writeheader()
        writer.writerows(rows)


def _within(budget_s: float, problems: Sequence[T], name: Callable[[T], str]) -> Iterator[T]:
    """Yields the problems, with a progress bar, until the budget is spent."""
    end = time.monotonic() + budget_s
    progress = Progress(len(problems), what="problems")
    for problem in problems:
        if time.monotonic() > end:
            print(f"\nthe budget of {budget_s:.0f} s is spent", file=sys.stderr)
            return
        progress.started(name(problem))
        yield problem
        progress.finished()


def measure(
    problems: Sequence[T],
    rows_of: Callable[[T], list[dict]],
    name: Callable[[T], str],
    budget_s: float,
    path: str | None,
) -> list[dict]:
    """Measures the problems within the budget and returns their rows, which the file has as soon
    as a problem is done. A problem that fails has no row, and a line on stderr."""
    rows = []
    for problem in _within(budget_s, problems, name):
        try:
            found = rows_of(problem)
        except RuntimeError as error:
            print(f"\n{name(problem)}: {error}", file=sys.stderr)
            continue
        if path:
            add(found, path)
        rows += found
    return rows


def run(
    arguments: argparse.Namespace,
    problems: Sequence[T],
    rows_of: Callable[[T], list[dict]],
    name: Callable[[T], str],
) -> list[dict]:
    """Measures as the options of `parser` say, or exits where there is no device."""
    if not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    with session():
        return measure(problems, rows_of, name, arguments.budget, arguments.csv)
