"""docs/support.md's tables of combinations: which tile each one gets, or why none."""

import re
from dataclasses import dataclass
from itertools import product

from scripts.documents import markdown
from scripts.documents.planner import BASE, plan

OPS = ("forward", "backward")
MASKS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window_size_left": 100, "window_size_right": 0},
}
# Lengths on both sides of every tile, so that a tile which is chosen by the number of queries
# shows.
QUERIES = (1, 64, 65, 128, 129, 192, 193, 256, 257, 512, 513, 4096)
AXES = {
    "queries": QUERIES,
    "layout": ("dense", "varlen"),
    "heads": ("MHA", "GQA"),
    "dtype": ("bf16", "fp16"),
    "deterministic": ("no", "yes"),  # of the backward
}
# Query's and key's, value's.
HEAD_DIMS = [(head_dim, head_dim) for head_dim in range(8, 321, 8)]
OTHER_HEAD_DIMS = {
    "no multiple of 8": (100, 100),
    "128, value 64": (128, 64),
    "64, value 128": (64, 128),
    "192, value 128": (192, 128),
    "576, value 512": (576, 512),
}


@dataclass(frozen=True)
class Outcome:
    tile: str = ""
    reason: str = ""


# the values of each axis, and what each mask gets with all of them
Box = tuple[dict[str, tuple], tuple[Outcome, ...]]


def outcome(problem: dict) -> Outcome:
    chosen = plan(problem)
    if not chosen.supported:
        # which head dim was asked about is in the row already
        return Outcome(reason=re.sub(r", is \d+$", "", chosen.reason))
    return Outcome(
        tile=f"{chosen.kernel.block_m} x {chosen.kernel.block_n}"
        + (", 2 CTAs" if chosen.kernel.two_cta else "")
    )


def problem_of(
    capability: int, op: str, head_dims: tuple[int, int], mask: str, values: dict
) -> dict:
    queries, layout = values["queries"], values["layout"]
    return BASE | MASKS[mask] | {
        "capability": capability,
        "op": op,
        "layout": layout,
        "dtype": values["dtype"],
        "seqlen_q": queries,
        "total_q": 2 * queries,
        "num_heads_kv": 2 if values["heads"] == "GQA" else 8,
        "head_dim": head_dims[0],
        "head_dim_v": head_dims[1],
        "deterministic": values.get("deterministic") == "yes",
    }  # fmt: skip


def boxes(outcomes: dict[tuple, tuple[Outcome, ...]], axes: dict[str, tuple]) -> list[Box]:
    """The combinations gathered into as few boxes as splitting one axis after another gives."""
    if len(set(outcomes.values())) == 1:
        return [(axes, next(iter(outcomes.values())))]
    for position, (axis, values) in enumerate(axes.items()):
        slices: dict[tuple, list] = {}
        for value in values:
            slices.setdefault(
                tuple(outcomes[key] for key in outcomes if key[position] == value), []
            ).append(value)
        if len(slices) > 1:
            return [
                box
                for same in slices.values()
                for box in boxes(
                    {key: outcomes[key] for key in outcomes if key[position] in same},
                    axes | {axis: tuple(same)},
                )
            ]
    raise AssertionError("outcomes differ along no axis")


def boxes_of(capability: int, op: str, head_dims: tuple[int, int]) -> list[Box]:
    axes = {
        axis: values for axis, values in AXES.items() if axis != "deterministic" or op == "backward"
    }
    combinations = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    outcomes = {
        tuple(values.values()): tuple(
            outcome(problem_of(capability, op, head_dims, mask, values)) for mask in MASKS
        )
        for values in combinations
    }
    return boxes(outcomes, axes)


def head_dim_rows(capability: int, op: str) -> list[tuple[str, list[Box]]]:
    """Head dims with what they get; neighbours that get the same are one row."""
    ranges: list[tuple[list[int], list[Box]]] = []
    for head_dim, head_dim_v in HEAD_DIMS:
        found = boxes_of(capability, op, (head_dim, head_dim_v))
        if ranges and ranges[-1][1] == found:
            ranges[-1][0].append(head_dim)
        else:
            ranges.append(([head_dim], found))
    rows = [
        (span(members, tuple(head_dim for head_dim, _ in HEAD_DIMS)), found)
        for members, found in ranges
    ]
    return rows + [
        (name, boxes_of(capability, op, head_dims)) for name, head_dims in OTHER_HEAD_DIMS.items()
    ]


def span(members: list[int] | tuple[int, ...], possible: tuple[int, ...]) -> str:
    """Neighbouring numbers in words; the last possible one stands for all that follow."""
    first, last = members[0], members[-1]
    if last == possible[-1]:
        return f"{first} and more"
    return f"{first}" if first == last else f"{first} to {last}"


def words(axis: str, values: tuple) -> str:
    return span(values, QUERIES) if axis == "queries" else ", ".join(values)


def tiles(capability: int, op: str) -> str:
    rows = head_dim_rows(capability, op)
    axes = [axis for axis in AXES if axis != "deterministic" or op == "backward"]
    split = [
        axis
        for axis in axes
        if any(box[axis] != AXES[axis] for _, found in rows for box, _ in found)
    ]
    reasons: list[str] = []

    def cell(got: Outcome) -> str:
        if got.tile:
            return got.tile
        if got.reason not in reasons:
            reasons.append(got.reason)
        return f"no ({reasons.index(got.reason) + 1})"

    lines = [
        (
            name,
            *(words(axis, box[axis]) if box[axis] != AXES[axis] else "all" for axis in split),
            *map(cell, outcomes),
        )
        for name, found in rows
        for box, outcomes in found
    ]
    same = {
        "queries": "every number of queries",
        "layout": "dense and varlen",
        "heads": "MHA and GQA",
        "dtype": "bf16 and fp16",
        "deterministic": "the deterministic backward and the other",
    }
    return "\n\n".join(
        [
            f"The same for {'; '.join(same[axis] for axis in axes if axis not in split)}.",
            markdown.table(("head dim", *split, *MASKS), *lines),
            "\n".join(f"- ({number}) {reason}" for number, reason in enumerate(reasons, 1)),
        ]
    )
