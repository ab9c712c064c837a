"""Sums up what became of the kernels: a verdict on each, a table, JSON for a bug report, and the
setting that leaves the broken ones out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fa4_ext import _cli_text
from fa4_ext.selftest.attempt import NOT_LOADED, NOT_RUN, RIGHT, WRONG
from fa4_ext.selftest.problems import CALLED, Kernel
from fa4_ext.selftest.supervisor import CRASHED, HUNG, Outcome

STATUSES = (RIGHT, WRONG, HUNG, CRASHED, NOT_LOADED, NOT_RUN)
BROKEN = (WRONG, HUNG, CRASHED, NOT_LOADED)

_OPS = (
    "forward", "decode", "backward", "backward_groups", "backward_queries", "backward_keys",
    "map_queries", "map_keys", "preprocess", "postprocess", "clear",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What was run on, and what became of each kernel: of those that are launched with another,
    too."""

    facts: dict
    outcomes: list[Outcome]
    ops: dict[str, str]  # of each kernel

    @property
    def ok(self) -> bool:
        return all(outcome.status == RIGHT for outcome in self.outcomes)

    @property
    def broken(self) -> list[str]:
        """The names to leave out. A kernel that is launched with another is not among them: no
        call launches it by itself."""
        return [
            outcome.kernel
            for outcome in self.outcomes
            if outcome.status in BROKEN and self.ops[outcome.kernel] in CALLED
        ]


def to_call(selected: Sequence[Kernel], kernels: Sequence[Kernel]) -> list[str]:
    """Returns the kernels to call for in order to test the selected ones: these, and those that
    launch one of them."""
    names = {kernel["name"] for kernel in selected}
    return [
        kernel["name"]
        for kernel in kernels
        if kernel["op"] in CALLED and (kernel["name"] in names or names & {*kernel["companions"]})
    ]


def with_companions(
    outcomes: Sequence[Outcome], selected: Sequence[Kernel], kernels: Sequence[Kernel]
) -> list[Outcome]:
    """Returns an outcome of each selected kernel. One that is launched with others is right if one
    of these is; where none is, it may be what is wrong with them."""
    by_name = {outcome.kernel: outcome for outcome in outcomes}
    found = []
    for kernel in selected:
        name = kernel["name"]
        if kernel["op"] in CALLED:
            found.append(by_name[name])
            continue
        with_it = [
            by_name[other["name"]]
            for other in kernels
            if name in other["companions"] and other["name"] in by_name
        ]
        found.append(_companion(name, with_it))
    return found


def _companion(name: str, with_it: list[Outcome]) -> Outcome:
    if any(outcome.status == RIGHT for outcome in with_it):
        return Outcome(name, RIGHT, "", 0.0)
    statuses = {outcome.status for outcome in with_it}
    status = next((status for status in BROKEN if status in statuses), NOT_RUN)
    count = len(with_it)
    return Outcome(name, status, f"of the {count} kernels that launch it none is right", 0.0)


def disable_line(report: Report) -> str:
    return f"FA4_EXT_DISABLE={','.join(report.broken)}"


def as_json(report: Report) -> dict:
    return {
        "ok": report.ok,
        **report.facts,
        "disable": report.broken,
        "kernels": [
            {"op": report.ops[outcome.kernel], **asdict(outcome)} for outcome in report.outcomes
        ],
    }


def text(report: Report) -> str:
    lines = _cli_text.labelled([(name, str(value)) for name, value in _head(report.facts)])
    lines += ["", *_table(report)]
    for outcome in report.outcomes:
        if outcome.status != RIGHT:
            head = f"{outcome.status:12}  "
            lines += ["", f"{head}{outcome.kernel}"]
            lines += _cli_text.labelled([("", outcome.detail)], indent=" " * 12)
    return "\n".join([*lines, "", *_conclusion(report)])


def _head(facts: dict) -> list[tuple[str, object]]:
    build = facts["build"]
    return [
        ("device", f"{facts['device']}, driver {facts['driver'] or 'unknown'}"),
        ("torch", f"{facts['torch']}, CUDA {facts['cuda']}"),
        (
            "fa4_ext",
            f"version {build['version']}, commit {build['commit']}, {build['subset']} subset",
        ),
        ("took", f"{facts['seconds']:.0f} s"),
    ]


def _table(report: Report) -> list[str]:
    counts = {
        op: [
            sum(
                report.ops[outcome.kernel] == op and outcome.status == status
                for outcome in report.outcomes
            )
            for status in STATUSES
        ]
        for op in _OPS
    }
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    widths = [max(len(status), 5) for status in STATUSES]
    rows = [("kernels", STATUSES), *((op, row) for op, row in counts.items() if any(row))]
    return [
        f"{name:11}"
        + "".join(f"  {value:>{width}}" for value, width in zip(row, widths, strict=True))
        for name, row in rows
    ]


def _conclusion(report: Report) -> list[str]:
    if report.ok:
        return ["Nothing is wrong"]
    if report.broken:
        return [
            "Without the broken kernels, in the environment or by register(disable=...):",
            disable_line(report),
        ]
    return ["Nothing is known to be wrong, but not every kernel ran"]
