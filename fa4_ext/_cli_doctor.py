"""This module is the command `python -m fa4_ext doctor`."""

from __future__ import annotations

from dataclasses import asdict

from fa4_ext import _cli_text, _doctor


def add_to(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check torch, the driver, the GPUs and this build; exit status 1 when something is "
        "wrong",
    )
    parser.add_argument(
        "--no-gpu",
        action="store_true",
        help="ask for no GPU and touch none, on a login node for example",
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.set_defaults(run=_run, needs_no_library=True)


def _run(arguments) -> int:
    report = _doctor.examine(gpu=not arguments.no_gpu)
    print(
        _cli_text.json_text({"ok": report.ok, **asdict(report)}) if arguments.json else text(report)
    )
    return not report.ok


def text(report: _doctor.Report) -> str:
    lines = [f"{check.status:5}  {check.name:12}  {check.sentence}" for check in report.checks]
    capability = call = None
    for row in report.calls:
        if row.capability != capability:
            lines += [
                "",
                "What would run on compute capability {}.{}, bf16 where a call does not say".format(
                    *row.capability
                ),
            ]
        if row.capability != capability or row.call != call:
            lines.append(f"  {row.call}")
        lines.append(f"    {row.direction:8}  {row.explanation}")
        capability, call = row.capability, row.call
    wrong = [check.name for check in report.checks if check.status == _doctor.WRONG]
    lines += ["", f"Wrong: {', '.join(wrong)}" if wrong else "Nothing is wrong"]
    return "\n".join(lines)
