"""Writes docs/support.md: the tile of every combination, and what no kernel takes. Prints which of
the calls in realistic_calls.py PyTorch's own kernels run, unless with --check.

PYTHONPATH=build/tests python -m scripts.documents.support
PYTHONPATH=build/tests python -m scripts.documents.support --check

All of it comes from the planner, which plans with the whole matrix whatever subset is compiled, and
from torch.ops.fa4_ext.explain; `make build` first. --check writes nothing: its exit status is 1
where the file says otherwise, and standard error says what.
"""

import argparse
import difflib
import sys
import textwrap
from dataclasses import dataclass

from scripts.documents import markdown
from scripts.documents.planner import ROOT, explain_op, plan
from scripts.documents.realistic_calls import CALLS, Call
from scripts.documents.support_limits import limits
from scripts.documents.support_tiles import BIASES, OPS, tiles
from tests.gpu.ways import VERSIONS, WAYS

PAGE = ROOT / "docs" / "support.md"
DEVICES = {
    90: "SM90 (Hopper, 9.0)",
    100: "SM100 (Blackwell, 10.0 and 10.3)",
}


@dataclass(frozen=True)
class Verdict:
    call: Call
    # Says why we have no kernel for the call; empty where we have one.
    uncovered: str
    # A speed rule gives this reason to leave the call to stock all the same.
    slower: str

    @property
    def runs(self) -> bool:
        return not self.uncovered and not self.slower


def verdict(call: Call, capability: int) -> Verdict:
    # Dropout is no part of the planner's problem.
    if call.dropout_p:
        return Verdict(call, explain_op(capability, dropout_p=call.dropout_p)[2], "")
    problem = call.problem(capability)
    uncovered = plan(problem).reason
    return Verdict(call, uncovered, "" if uncovered else plan(problem, speed_rules=True).reason)


def share(count: int, of: int) -> str:
    return f"{count} ({100 * count / of:.1f}%)"


def shares(verdicts: dict[int, list[Verdict]]) -> str:
    def row(name: str, chosen) -> tuple:
        mine = [
            [verdict for verdict in found if chosen(verdict.call)] for found in verdicts.values()
        ]
        total = len(mine[0])
        run = (
            share(count, total)
            for found in mine
            for count in (sum(v.runs for v in found), sum(not v.uncovered for v in found))
        )
        return (name, total, *run)

    heads = (
        head
        for capability in verdicts
        for head in (f"SM{capability}", f"SM{capability} without speed rules")
    )
    uses, families = (
        tuple(dict.fromkeys(names))
        for names in zip(*((c.use, c.model.family) for c in CALLS), strict=True)
    )
    return markdown.table(
        ("", "calls", *heads),
        row("**all**", lambda call: True),
        *(row(use, lambda call, use=use: call.use == use) for use in uses),
        *(
            row(family, lambda call, family=family: call.model.family == family)
            for family in families
        ),
    )


def fallbacks(verdicts: list[Verdict]) -> str:
    groups: dict[str, list[str]] = {}
    for kind in ("no kernel", "a speed rule leaves it to PyTorch's kernel"):
        for found in verdicts:
            reason = found.uncovered if kind == "no kernel" else found.slower
            if reason:
                groups.setdefault(f"{kind}: {reason}", []).append(found.call.name)
    return "\n\n".join(
        f"{len(names)} call{'s' if len(names) > 1 else ''}, {reason}\n\n"
        + "\n".join(f"- {name}" for name in names)
        for reason, names in groups.items()
    )


def calls() -> str:
    verdicts = {capability: [verdict(call, capability) for call in CALLS] for capability in DEVICES}
    parts = [shares(verdicts)]
    for capability, found in verdicts.items():
        parts += [f"### Fallbacks on SM{capability}", fallbacks(found)]
    return "\n\n".join(parts)


def ways() -> str:
    """Returns who runs each way of calling attention, a column a version of torch. Ways that fare
    alike share a row."""
    versions = tuple(f"torch {major}.{minor}" for major, minor in VERSIONS)
    alike: dict[tuple[str, ...], list[str]] = {}
    for way in WAYS:
        runs = tuple(way.runs_in(version) for version in VERSIONS)
        alike.setdefault(runs, []).append(way.name)
    return markdown.table(
        ("calls", *versions), *(("; ".join(names), *runs) for runs, names in alike.items())
    )


def prose(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def page() -> str:
    combinations = [
        part
        for capability, name in DEVICES.items()
        for op in OPS
        for part in (f"### {name}, {op}", tiles(capability, op))
    ]
    masked = [
        part
        for op in OPS
        for part in (f"### {DEVICES[90]}, {op} with attn_mask", tiles(90, op, BIASES))
    ]
    parts = [
        "# What runs on our kernels",
        prose(
            "`make docs` writes this file from the planner's answers for all "
            "kernels of the wheel; do not edit it. PyTorch's own kernel runs the other calls, or "
            'they raise the reason with `fallback="error"`.'
        ),
        "## Ways to call attention",
        prose(
            "On Hopper, in bf16. What is not said otherwise is an argument of "
            "`F.scaled_dot_product_attention`. tests/gpu/test_ways.py holds this to the profiler."
        ),
        ways(),
        "## Head dims and tiles",
        prose(
            'A cell is the tile, queries x keys; "2 CTAs" means that a pair of CTAs computes it. '
            "192/128 is a head dim of 192 for query and key, 128 for value. Where a backward runs "
            "in two passes (head dims 200 to 256 and attn_mask on SM90), the tile is that of the "
            "second. Head dims are multiples of 8; `F.scaled_dot_product_attention` pads others. "
            "Causal and window masks are aligned bottom-right. Speed rules are not applied. "
            "Few queries run the decode kernel, whose tiles have 16 or 64 rows, on SM100 16 or 32. "
            "How many that are depends on the numbers of heads and sequences, here 2 sequences of "
            "8 heads. With keys in pages the tiles are those of varlen. "
            "kernels/tile_rules.csv names other tiles for some self-attention on SM90. Some "
            "backwards of GQA there, and of short packed sequences, run the group kernel "
            "(docs/kernels-sm90.md), whose tile is 64x128."
        ),
        *combinations,
        *masked,
        "## Calls that no kernel covers",
        limits(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail where the file says otherwise"
    )
    check = parser.parse_args().check
    new = page()
    if check:
        old = PAGE.read_text() if PAGE.exists() else ""
        difference = difflib.unified_diff(
            old.splitlines(), new.splitlines(), "docs/support.md", "the planner", lineterm=""
        )
        text = "\n".join(difference)
        if text:
            print(
                f"{text}\ndocs/support.md is out of date: run make docs",
                file=sys.stderr,
            )
        return 1 if text else 0
    PAGE.write_text(new)
    print(calls())
    return 0


if __name__ == "__main__":
    sys.exit(main())
