"""Runs cases one after the other, counts what became of them and collects what is wrong."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from cases import Problem

from fuzz.case import Case, features
from fuzz.check import check

ENDS = ("ours", "stock", "mixed", "rejected", "skipped", "failed")


@dataclass(frozen=True)
class Failure:
    case: Case
    message: str

    @property
    def kind(self) -> str:
        """Returns the message without its numbers, which is what failures of one cause have in
        common."""
        return re.sub(r"-?\d[\d.]*(e[+-]?\d+)?|\binf\b|\bnan\b", "#", self.message)


@dataclass
class Report:
    seed: int
    # (op, layout, one of ENDS)
    ends: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    died: bool = False  # the CUDA context broke, and the run ended

    @property
    def count(self) -> int:
        return sum(self.ends.values())

    def total(self, end: str) -> int:
        return sum(count for (_, _, ended), count in self.ends.items() if ended == end)

    def distinct(self) -> list[tuple[Failure, int]]:
        """Returns the first failure of each kind, and how many there are of it."""
        kinds: dict[str, list[Failure]] = {}
        for failure in self.failures:
            kinds.setdefault(failure.kind, []).append(failure)
        return [(failures[0], len(failures)) for failures in kinds.values()]

    def text(self) -> str:
        """Returns a table of ops and ends, then every distinct failure with the case that shows
        it."""
        rows = sorted({(op, layout) for op, layout, _ in self.ends})
        lines = [f"seed {self.seed}: {self.count} cases in {self.seconds:.1f} s"]
        lines.append(f"{'':24}" + "".join(f"{end:>10}" for end in ENDS))
        lines += [
            f"{f'{op} {layout}':24}" + "".join(f"{self.ends[op, layout, end]:10}" for end in ENDS)
            for op, layout in rows
        ]
        lines.append(f"{'all':24}" + "".join(f"{self.total(end):10}" for end in ENDS))
        for failure, count in self.distinct():
            lines += ["", f"{count} x {failure.message}", f"    {failure.case!r}"]
        if self.died:
            lines += ["", "The last case broke the CUDA context: the run ended there."]
        return "\n".join(lines)

    def json(self) -> dict:
        ends = {
            f"{op} {layout} {end}": count for (op, layout, end), count in sorted(self.ends.items())
        }
        failures = [
            {"message": failure.message, "case": repr(failure.case)} for failure in self.failures
        ]
        totals = {end: self.total(end) for end in ENDS}
        about = {
            "seed": self.seed,
            "count": self.count,
            "seconds": round(self.seconds, 1),
            "died": self.died,
        }
        return (
            about
            | totals
            | {"ends": ends, "features": dict(sorted(self.features.items())), "failures": failures}
        )


def run_cases(seed: int, cases: Iterable[Case], engine, progress=None) -> Report:
    """Runs every case, unless one breaks the CUDA context. `progress` is that of
    fa4_ext/bench/progress.py."""
    report = Report(seed)
    begin = time.monotonic()
    with warnings.catch_warnings():
        # F.scaled_dot_product_attention says at length why flash attention takes no such call
        warnings.simplefilter("ignore")
        for case in cases:
            if progress:
                progress.started(_short(case.op, case.problem))
            report.ends[case.op, case.layout, _end(case, engine, report)] += 1
            report.features.update(features(case))
            if progress:
                progress.finished()
            if report.died:
                break
    report.seconds = time.monotonic() - begin
    return report


def _end(case: Case, engine, report: Report) -> str:
    if engine.cannot_run(case):
        return "skipped"
    try:
        end = check(case, engine)
        engine.synchronize()
        return end
    except Exception as error:
        message = (
            str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        )
        report.failures.append(Failure(case, message))
    try:
        engine.synchronize()
    except Exception:
        report.died = True
    return "failed"


def _short(op: str, problem: Problem) -> str:
    return (
        f"{op} b{problem.batch} h{problem.heads}/{problem.heads_kv} q{problem.max_q} "
        f"k{problem.max_k} d{problem.head_dim}"
    )
