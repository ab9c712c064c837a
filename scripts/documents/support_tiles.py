"""Writes docs/support.md's tables of head dims and tiles."""

from itertools import product

from scripts.documents import markdown
from scripts.documents.planner import BASE, plan

OPS = ("forward", "backward")
MASKS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window_size_left": 100, "window_size_right": 0},
}
BIASES = {"attn_mask": {"bias": (1, 1)}}  # of dense tensors alone
# There are lengths on both sides of every tile, so that the table shows a tile which is chosen by
# the number of queries, or of queries times the four heads that share keys in GQA.
QUERIES = (1, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 192, 193, 256, 257, 512, 513, 4096)
AXES = {
    "queries": QUERIES,
    "layout": ("dense", "varlen"),
    "heads": ("MHA", "GQA"),
    "dtype": ("bf16", "fp16"),
    # Only the backward has this.
    "deterministic": ("no", "yes"),
}
# Pairs of query and key's head dim and value's.
HEAD_DIMS = [(head_dim, head_dim) for head_dim in range(8, 257, 8)]
OTHER_HEAD_DIMS = {"128/64": (128, 64), "64/128": (64, 128), "192/128": (192, 128)}

# A box holds the values of each axis, and the tile that each mask gets with all of them.
Box = tuple[dict[str, tuple], tuple[str, ...]]


def tile(problem: dict) -> str:
    """Returns the tile of the kernel that runs, or why none does. The page's text has that of the
    group kernel: where it runs depends on more than the page has columns for."""
    chosen = plan(problem, disabled=("*_backward_groups_*",))
    if not chosen.supported:
        return f"none: {chosen.reason}"
    pair = ", 2 CTAs" if chosen.kernel.two_cta else ""
    return f"{chosen.kernel.block_m}x{chosen.kernel.block_n}{pair}"


def problem_of(
    capability: int, op: str, head_dims: tuple[int, int], mask: dict, values: dict
) -> dict:
    queries, layout = values["queries"], values["layout"]
    return BASE | mask | {
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


def boxes(outcomes: dict[tuple, tuple[str, ...]], axes: dict[str, tuple]) -> list[Box]:
    """Groups the combinations into boxes with equal outcomes, splitting along one axis after
    another where outcomes differ."""
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


def axes_of(op: str, masks: dict[str, dict]) -> dict[str, tuple]:
    axes = AXES if masks is MASKS else AXES | {"layout": ("dense",)}
    return {
        axis: values for axis, values in axes.items() if axis != "deterministic" or op == "backward"
    }


def boxes_of(
    capability: int, op: str, head_dims: tuple[int, int], masks: dict[str, dict]
) -> list[Box]:
    axes = axes_of(op, masks)
    combinations = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    outcomes = {
        tuple(values.values()): tuple(
            tile(problem_of(capability, op, head_dims, mask, values)) for mask in masks.values()
        )
        for values in combinations
    }
    return boxes(outcomes, axes)


def head_dim_rows(
    capability: int, op: str, masks: dict[str, dict] = MASKS
) -> list[tuple[str, list[Box]]]:
    """Returns head dims and what they get. Those that get the same share a row."""
    ranges: list[tuple[list[int], list[Box]]] = []
    for head_dim, head_dim_v in HEAD_DIMS:
        found = boxes_of(capability, op, (head_dim, head_dim_v), masks)
        if ranges and ranges[-1][1] == found:
            ranges[-1][0].append(head_dim)
        else:
            ranges.append(([head_dim], found))
    rows = [(f"{members[0]}-{members[-1]}", found) for members, found in ranges]
    for name, head_dims in OTHER_HEAD_DIMS.items():
        found = boxes_of(capability, op, head_dims, masks)
        same = [index for index, (_, known) in enumerate(rows) if known == found]
        if same:
            rows[same[0]] = (f"{rows[same[0]][0]}, {name}", found)
        else:
            rows.append((name, found))
    return rows


def words(axis: str, values: tuple) -> str:
    """Returns an axis's values as text. Neighbouring numbers of queries become a range; the largest
    number stands for all above it."""
    if axis != "queries":
        return ", ".join(values)
    first, last = values[0], values[-1]
    return f"{first}+" if last == QUERIES[-1] else f"{first}-{last}"


def tiles(capability: int, op: str, masks: dict[str, dict] = MASKS) -> str:
    rows = head_dim_rows(capability, op, masks)
    axes = axes_of(op, masks)
    split = [
        axis
        for axis in axes
        if any(box[axis] != axes[axis] for _, found in rows for box, _ in found)
    ]
    lines = [
        (
            name,
            *(words(axis, box[axis]) if box[axis] != axes[axis] else "all" for axis in split),
            *outcomes,
        )
        for name, found in rows
        for box, outcomes in found
    ]
    same = {
        "queries": "all lengths",
        "layout": " and ".join(axes["layout"]),
        "heads": "MHA and GQA",
        "dtype": "bf16 and fp16",
        "deterministic": "deterministic or not",
    }
    return "\n\n".join(
        [
            f"Same for {'; '.join(same[axis] for axis in axes if axis not in split)}.",
            markdown.table(("head dim", *split, *masks), *lines),
        ]
    )
