"""Compares a result with an older one of the same grid."""

from __future__ import annotations

import statistics

from fa4_ext.bench.table import NONE, columns

# Where these differ, the speeds may differ for that reason alone.
SAME = ("device", "torch", "cudnn", "dtype")


def ratios(old: dict, new: dict) -> dict[str, dict[str, float]]:
    """Returns {row: {contender: old time over new time}} for the rows and contenders that both
    have. Above 1 the new one is faster."""
    before = {row["name"]: row["results"] for row in old["throughput"]}
    found = {}
    for row in new["throughput"]:
        pairs = {
            who: (before.get(row["name"], {}).get(who, {}), now)
            for who, now in row["results"].items()
        }
        found[row["name"]] = {
            who: then["ms"] / now["ms"]
            for who, (then, now) in pairs.items()
            if "ms" in then and "ms" in now
        }
    return {name: of_row for name, of_row in found.items() if of_row}


def text(old: dict, new: dict) -> str:
    found = ratios(old, new)
    names = [name for name in new["contenders"] if any(name in of_row for of_row in found.values())]
    cells = [
        (row, [f"{of_row[name]:.3f}" if name in of_row else NONE for name in names])
        for row, of_row in found.items()
    ]
    lines = (
        columns("old time over new time", names, cells)
        if found
        else ["The two results have no row in common."]
    )
    lines.append("")
    for name in names:
        of_name = {row: of_row[name] for row, of_row in found.items() if name in of_row}
        worst, best = (pick(of_name, key=of_name.__getitem__) for pick in (min, max))
        lines.append(
            f"{name}: {statistics.geometric_mean(of_name.values()):.3f} in geometric mean over "
            f"{len(of_name)} rows, "
            f"{of_name[worst]:.3f} at worst ({worst}), {of_name[best]:.3f} at best ({best})"
        )
    for key in SAME:
        then, now = old["header"].get(key), new["header"].get(key)
        if then != now:
            lines.append(f"not the same {key}: old {then}, new {now}")
    return "\n".join(lines).rstrip()
