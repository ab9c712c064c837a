"""Renews what the documents show of benchmarks/results: tables, and what `bench --from` prints of a
result.

python -m scripts.documents.performance
python -m scripts.documents.performance --check

A table or a sentence stands between `<!-- measured: NAME -->` and `<!-- end of NAME -->`; NAME is
one of MEASURED.
--check writes nothing: its exit status is 1 where a document says otherwise, and standard error
says what.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import geometric_mean

from benchmarks import uncovered as uncovered_calls
from benchmarks.clients import report
from fa4_ext.bench import masks as kinds
from fa4_ext.bench import results, table
from scripts.documents import markdown

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = tuple(
    ROOT / name
    for name in ("README.md", "docs/performance.md", "docs/commands.md", "docs/clients.md")
)
PRINTED = re.compile(
    r"(^```\n\$ python -m fa4_ext bench --from (\S+)\n).*?(^```$)", re.DOTALL | re.MULTILINE
)
LINES_SHOWN = 12  # of what `bench --from` prints: the header and two rows
MARKED = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)

NAMES = {
    "ours": "fa4_ext", "stock": "PyTorch (FA2)", "cudnn": "cuDNN", "fa3": "FlashAttention-3",
    "fa4": "flash-attn-4 (JIT)", "efficient": "PyTorch's memory-efficient kernel",
}  # fmt: skip
GRIDS = {
    "paper": "head dims 64 and 128",
    "paper_gqa": "the same, GQA 8:1", "paper_gqa_backward": "the same, GQA 8:1",
    "fp16": "the same, fp16", "dims": "head dims 96, 192 and 256", "llama": "Llama models",
    "vit": "images",
    "gqa": "GQA ratios", "varlen": "packed sequences", "decode": "few queries, many keys",
    "masks": "masks that are tensors",
}  # fmt: skip
# The rules, which `bench` leaves out, leave part of this grid to PyTorch's kernel, and masks of
# this kind to cuDNN.
SPEED_RULES = ("varlen backward",)
LEFT_OUT = kinds.SLOPES


def result(name: str) -> dict:
    return json.loads((RESULTS / f"h200_{name}.json").read_text())


def rows(name: str, direction: str) -> list[dict]:
    return [row for row in result(name)["throughput"] if row["direction"] == direction]


def problem(row: dict) -> str:
    return row["name"].removesuffix(f" {row['direction']}")


def ratio(value: float) -> str:
    # A narrow loss shows only in the third decimal.
    return f"{value:.3f}" if value < 1.1 else f"{value:.2f}"


def number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def speeds(found: list[dict], names: tuple[str, ...]) -> dict[str, tuple[float, str]]:
    """Returns, for each problem, our speed over the fastest of these contenders, and that
    contender's name."""
    return {
        problem(row): min(
            (row["speed_of_ours"][name], name) for name in names if name in row["speed_of_ours"]
        )
        for row in found
        if any(name in row["speed_of_ours"] for name in names)
    }


def mean_and_worst(found: list[dict], names: tuple[str, ...]) -> tuple[str, str]:
    """Returns the geometric mean, and the worst ratio with its problem; with several contenders
    also the name of the fastest in that problem."""
    by_problem = speeds(found, names)
    if not by_problem:
        return "", ""
    worst = min(by_problem, key=by_problem.get)
    value, who = by_problem[worst]
    where = f"{worst}, {NAMES[who]}" if len(names) > 1 else worst
    return ratio(
        geometric_mean(speed for speed, _ in by_problem.values())
    ), f"{ratio(value)} ({where})"


def peers(name: str) -> tuple[str, ...]:
    return tuple(who for who in NAMES if who != "ours" and who in result(name)["contenders"])


def against() -> str:
    """Makes the table of our speed over each contender of the grid `paper`."""
    forward, backward = rows("paper", "forward"), rows("paper", "backward")
    each = [
        (NAMES[who], *mean_and_worst(forward, (who,)), *mean_and_worst(backward, (who,)))
        for who in peers("paper")
    ]
    fastest = (
        "the fastest of them",
        *mean_and_worst(forward, peers("paper")),
        *mean_and_worst(backward, peers("paper")),
    )
    return markdown.table(
        ("speed of fa4_ext over", "forward", "worst row", "backward", "worst row"), *each, fastest
    )


def fastest() -> str:
    """Makes the table of our speed on every grid over the fastest contender in each row."""
    found = []
    for direction in ("forward", "backward"):
        for name, title in GRIDS.items():
            some = [row for row in rows(name, direction) if row.get("mask") != LEFT_OUT]
            if some and f"{name} {direction}" not in SPEED_RULES:
                found.append((f"{title}, {direction}", *mean_and_worst(some, peers(name))))
    return markdown.table(("", "geometric mean", "worst row"), *found)


def spread(values: list[float]) -> str:
    """Returns the geometric mean, and the least and the greatest."""
    if not values:
        return ""
    return f"{geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def masks() -> str:
    """Makes the table of our speed with each kind of mask, over the fastest contender with that
    mask, and over ours where the same problem needs no tensor: in the forward, and in forward and
    backward together."""
    times: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in result("masks")["throughput"]:
        of_contender = {who: one["ms"] for who, one in row["results"].items() if "ms" in one}
        times.setdefault((row["mask"], problem(row)), {})[row["direction"]] = of_contender
    speeds: dict[str, list[list[float]]] = {kind: [[], [], [], []] for kind in kinds.KINDS}
    for (kind, _), found in times.items():
        forward, backward = found["forward"], found["backward"]
        both = {who: forward[who] + backward[who] for who in forward if who in backward}
        for place, ms in enumerate((forward, both)):
            peer_ms = min(ms[who] for who in peers("masks") if who in ms)
            speeds[kind][place].append(peer_ms / ms["ours"])
            if "unmasked" in ms:
                speeds[kind][place + 2].append(ms["unmasked"] / ms["ours"])
    most = [speeds[kind] for kind in kinds.KINDS if kind != LEFT_OUT]
    speeds[f"all but {LEFT_OUT}"] = [[*chain(*columns)] for columns in zip(*most, strict=True)]
    return markdown.table(
        (
            "mask",
            "forward",
            "forward and backward",
            "over no mask tensor, forward",
            "over no mask tensor, forward and backward",
        ),
        *((kind, *map(spread, columns)) for kind, columns in speeds.items()),
    )


def ceiling() -> str:
    """Makes the table of our speed relative to the matrix product of the same process, at the
    longest length without a mask."""
    found = {"forward": {}, "backward": {}}
    for name in ("paper", "dims"):
        for direction, of_head_dim in found.items():
            longest = [
                row
                for row in rows(name, direction)
                if not row["causal"] and row["seqlen_q"] == 16384
            ]
            product = result(name)["header"]["matmul_tflops"]
            of_head_dim |= {
                row["head_dim"]: row["results"]["ours"]["tflops"] / product for row in longest
            }
    head_dims = sorted(found["forward"])
    lines = [
        (direction, *(f"{of_head_dim[d]:.2f}" for d in head_dims))
        for direction, of_head_dim in found.items()
    ]
    return markdown.table(("head dim", *head_dims), *lines)


def host() -> str:
    who = ("ours", *peers("paper"))
    times = {row["name"]: row["us"] for row in result("paper")["host"]}
    lines = [
        (
            name,
            *(number(us[one]) if one in us else "" for one in who),
            ratio(us["ours"] / us["stock"]),
        )
        for name, us in times.items()
    ]
    return markdown.table(
        ("us to enqueue a call", *(NAMES[one] for one in who), "fa4_ext / PyTorch"), *lines
    )


def uncovered() -> str:
    """Makes the sentence about the time of the calls that our kernels do not cover."""
    # A kernel may cover today what none did when the result was measured.
    ratios = [
        row["ratio"]
        for row in result("uncovered")["rows"]
        if row["call"] in uncovered_calls.CALLS and not row["call"].startswith("covered")
    ]
    return (
        f"{len(ratios)} calls with dropout or fp32 took {min(ratios):.3f} to "
        f"{max(ratios):.3f} of the time without fa4_ext."
    )


def clients() -> str:
    """Makes the table of the programs. The last columns are of the integration, where a program has
    it."""
    found = []
    for name, of_program in result("clients")["clients"].items():
        speed = report.speed_ups(of_program, "gpu_ms")
        ours = of_program["fa4_ext" if "fa4_ext" in speed else "import"]
        speeds = (f"{speed[one]:.2f}" if one in speed else "" for one in ("import", "fa4_ext"))
        over_best = report.best_without(of_program) / ours["gpu_ms"]
        found.append((name, *speeds, f"{over_best:.2f}", f"{report.worst_error(ours):.2f}"))
    return markdown.table(
        (
            "program",
            "`import fa4_ext`",
            '`attn_implementation="fa4_ext"`',
            "over the best backend",
            "error / math's",
        ),
        *found,
    )


def programs() -> str:
    """Makes the sentence about them."""
    each = result("clients")["clients"].values()
    ups = [
        speed["fa4_ext"] for one in each if "fa4_ext" in (speed := report.speed_ups(one, "gpu_ms"))
    ]
    return (
        f"In GPU time, {len(ups)} programs of transformers run {min(ups):.2f} to {max(ups):.1f} "
        f"times as fast as without fa4_ext, {geometric_mean(ups):.2f} times in geometric mean."
    )


MEASURED: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (against, fastest, masks, ceiling, host, uncovered, clients, programs)
}


def shortened(path: str) -> str:
    """Returns what `bench --from` prints, with `...` in place of most rows."""
    printed = results.load(str(ROOT / path), "--from")
    lines = table.text(printed).splitlines()
    summary = table.summary(printed)
    more = ["..."] if lines[-1] != summary[-1] else []
    return "\n".join([*lines[:LINES_SHOWN], "...", "", *summary, *more]) + "\n"


def renewed(text: str) -> str:
    text = MARKED.sub(lambda match: f"{match[1]}\n{MEASURED[match[2]]()}\n\n{match[3]}", text)
    return PRINTED.sub(lambda match: f"{match[1]}{shortened(match[2])}{match[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail where a document says otherwise"
    )
    check, stale = parser.parse_args().check, False
    for path in DOCUMENTS:
        old = path.read_text()
        new = renewed(old)
        if check and new != old:
            difference = difflib.unified_diff(
                old.splitlines(), new.splitlines(), path.name, "benchmarks/results", lineterm=""
            )
            print(
                "\n".join(difference),
                f"\n{path.name} is out of date: run make docs",
                file=sys.stderr,
            )
            stale = True
        elif not check:
            path.write_text(new)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
