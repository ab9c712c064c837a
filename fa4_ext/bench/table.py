"""Formats a result as text for a terminal."""

from __future__ import annotations

import statistics

from fa4_ext._cli_text import labelled
from fa4_ext.bench.grids import GRIDS, MICROSECONDS

FAILED, NONE = "failed", "-"


def text(result: dict) -> str:
    parts = [header(result["header"]), throughput(result), summary(result)]
    if "host" in result:
        parts.append(host(result, "us", "host microseconds a call", ".1f"))
        parts.append(host(result, "graph_nodes", "CUDA graph nodes of a call", "d"))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def header(facts: dict) -> list[str]:
    build = facts["build"]
    rows = [
        ("device", f"{facts['device']}, driver {facts.get('driver_version', 'unknown')}"),
        ("clocks",
        f"SM {facts.get('clocks.sm', 'unknown')} of {facts.get('clocks.max.sm', 'unknown')}, "
        "memory "
                   f"{facts.get('clocks.mem', 'unknown')}, power limit "
                   f"{facts.get('power.limit', 'unknown')}"),
        ("torch", f"{facts['torch']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}"),
        ("fa4_ext", f"version {build.get('version', 'unknown')}, commit "
            f"{build.get('commit', 'unknown')}"),
    ]  # fmt: skip
    if "versions" in facts:
        rows.append(
            (
                "contenders",
                ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
            )
        )
    rows += [
        (
            "ceiling",
            f"{facts['matmul_tflops']} TFLOP/s, an 8192^3 {facts['dtype']} matrix product in this "
            "process",
        ),
        (
            "rounds",
            f"{facts['rounds']}, contenders in random order in each; inputs rotate, so that none "
            "is found in L2",
        ),
        ("date", facts["date"]),
    ]
    return labelled(rows)


def columns(title: str, names: list[str], rows: list[tuple[str, list[str]]]) -> list[str]:
    """Returns the lines of a table: the title heads the first column, the names head the others,
    and each column is as wide as its widest cell."""
    first = max(map(len, [title, *(name for name, _ in rows)]))
    widths = [
        max([len(name), *(len(cells[i]) for _, cells in rows)]) for i, name in enumerate(names)
    ]
    return [
        f"{name:{first}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in [(title, names), *rows]
    ]


def _cell(measured: dict | None, unit: str) -> str:
    if measured is None:
        return NONE
    if "error" in measured:
        return FAILED
    value = f"{1e3 * measured['ms']:.1f}" if unit == MICROSECONDS else f"{measured['tflops']:.0f}"
    return f"{value} ({measured['spread']:.1%})"


def throughput(result: dict) -> list[str]:
    names, unit = list(result["contenders"]), GRIDS[result["grid"]].unit
    rows = [
        (row["name"], [_cell(row["results"].get(name), unit) for name in names])
        for row in result["throughput"]
    ]
    return columns(f"{unit} (spread of the rounds)", names, rows)


def summary(result: dict) -> list[str]:
    """Returns lines with our speed over every other contender's, and a line for each reason for
    which a contender failed."""
    found = []
    for name in result["contenders"]:
        speeds = {
            row["name"]: row["speed_of_ours"][name]
            for row in result["throughput"]
            if name in row["speed_of_ours"]
        }
        if speeds:
            mean = statistics.geometric_mean(speeds.values())
            worst = min(speeds, key=speeds.__getitem__)
            found.append(
                f"ours over {name}: {mean:.3f} in geometric mean, {speeds[worst]:.3f} at worst "
                f"({worst})"
            )
    failures: dict[tuple[str, str], list[str]] = {}
    for row in result["throughput"]:
        for who, measured in row["results"].items():
            if "error" in measured:
                failures.setdefault((who, measured["error"]), []).append(row["name"])
    for (who, error), rows in failures.items():
        found.append(
            f"{who} failed at {len(rows)} of {len(result['throughput'])} rows, first {rows[0]}: "
            f"{error}"
        )
    return found


def host(result: dict, key: str, title: str, form: str) -> list[str]:
    names = list(result["contenders"])
    rows = [
        (
            row["name"],
            [format(row[key][name], form) if name in row[key] else NONE for name in names],
        )
        for row in result["host"]
        if key in row
    ]
    return columns(title, names, rows) if rows else []
