"""Draws a result as a figure. This is the only module that needs matplotlib, on which fa4_ext does
not depend."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fa4_ext.bench.grids import GRIDS, HIDDEN_SIZE, MICROSECONDS
from fa4_ext.bench.shapes import DIRECTIONS

FORMATS = (".png", ".svg", ".pdf")
# A contender has the same hue in every figure; ours is the strong one.
COLOURS = {
    "ours": "#c0392b",
    "stock": "#b8bec6",
    "cudnn": "#76a95b",
    "fa4": "#5b8fd0",
    "fa3": "#9b7fc1",
    "efficient": "#d9a441",
    "unmasked": "#e8a49c",
    "flex": "#6fb7b2",
}
BARS = 0.82  # of the room between two groups
CEILING = {
    "color": "#444444",
    "linestyle": ":",
    "linewidth": 1.2,
    "label": "matrix product, 8192^3",
}


def check(paths: list[str]) -> None:
    """Raises ValueError if the figures could not be written. It is called before the minutes of
    measuring, not after."""
    for path in paths:
        if Path(path).suffix not in FORMATS:
            raise ValueError(f"argument --figure: {path} must end in {', '.join(FORMATS)}")
    if paths and find_spec("matplotlib") is None:
        raise ValueError(
            "argument --figure: matplotlib is not installed; it is with: python -m pip install "
            "matplotlib"
        )


def draw(result: dict, paths: list[str]) -> None:
    """Writes the figure once for each path. The suffix of a path is the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = (_by_length if GRIDS[result["grid"]].by_length else _by_name)(pyplot, result)
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _conditions(result: dict) -> str:
    header = result["header"]
    return f"{header['device']}, {header['dtype']}, torch {header['torch']}"


def _directions(result: dict) -> list[str]:
    there = {row["direction"] for row in result["throughput"]}
    return [direction for direction in DIRECTIONS if direction in there]


def _value(row: dict, contender: str, unit: str) -> float:
    """Returns the height of a bar; 0 if the contender was not measured."""
    measured = row["results"].get(contender, {})
    return 1e3 * measured.get("ms", 0.0) if unit == MICROSECONDS else measured.get("tflops", 0.0)


def _bars(axis, result: dict, panel: list[dict], unit: str, bar) -> None:
    """Draws a group of bars for each row of the panel. `bar` is axis.bar or axis.barh."""
    labels = result["contenders"]
    width = BARS / len(labels)
    for index, (name, label) in enumerate(labels.items()):
        places = [place + (index - (len(labels) - 1) / 2) * width for place in range(len(panel))]
        bar(
            places,
            [_value(row, name, unit) for row in panel],
            width,
            label=label,
            color=COLOURS[name],
            zorder=2,
        )
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure, axis, place: str) -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc=place, ncols=len(names), frameon=False, fontsize=11)


def _by_length(pyplot, result: dict):
    """Draws bars by sequence length, in a panel for each head dim, mask and direction."""
    rows, unit, directions = result["throughput"], GRIDS[result["grid"]].unit, _directions(result)
    columns = sorted({(row["head_dim"], row["causal"]) for row in rows})
    size = (4.2 * len(columns), 3.5 * len(directions))
    figure, axes = pyplot.subplots(
        len(directions), len(columns), figsize=size, sharey="row", squeeze=False
    )
    for line, direction in zip(axes, directions, strict=True):
        for axis, (head_dim, causal) in zip(line, columns, strict=True):
            panel = [
                row
                for row in rows
                if (row["head_dim"], row["causal"], row["direction"])
                == (head_dim, causal, direction)
            ]
            panel.sort(key=lambda row: row["seqlen_q"])
            _bars(axis, result, panel, unit, axis.bar)
            axis.axhline(result["header"]["matmul_tflops"], **CEILING)
            axis.set_title(
                f"{direction}, head dim {head_dim}, {'causal' if causal else 'full'}", fontsize=11
            )
            axis.set_xticks(range(len(panel)), [_length(row["seqlen_q"]) for row in panel])
            axis.grid(axis="y", color="#e6e6e6", zorder=0)
        line[0].set_ylabel(unit)
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    _legend(figure, axes[0][0], "upper center")
    ratio = rows[0]["heads"] // rows[0]["heads_kv"]
    shared = f", {ratio} query heads on a head of keys and values" if ratio > 1 else ""
    conditions = f"{_conditions(result)}, 16k tokens, hidden size {HIDDEN_SIZE}{shared}"
    figure.text(0.5, 0.005, conditions, ha="center", color="#666666")
    # The margins are in inches, for the conditions below and the legend above.
    figure.tight_layout(rect=(0, 0.18 / size[1], 1, 1 - 0.35 / size[1]))
    return figure


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def _by_name(pyplot, result: dict):
    """Draws horizontal bars by row, the first on top, in a panel for each direction."""
    unit, directions = GRIDS[result["grid"]].unit, _directions(result)
    panels = [
        [row for row in result["throughput"] if row["direction"] == direction]
        for direction in directions
    ]
    size = (6.5 * len(panels), 1.2 + 0.16 * (len(result["contenders"]) + 1) * max(map(len, panels)))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, direction, panel in zip(axes[0], directions, panels, strict=True):
        _bars(axis, result, panel, unit, axis.barh)
        axis.grid(axis="x", color="#e6e6e6", zorder=0)
        if unit == MICROSECONDS:
            # Rows go from a single short sequence to a hundred long ones.
            axis.set_xscale("log")
            axis.set_title(f"{direction}, {unit}, logarithmic, lower is better", fontsize=11)
        else:
            axis.axvline(result["header"]["matmul_tflops"], **CEILING)
            axis.set_title(f"{direction}, {unit}", fontsize=11)
    # The panels share its axis.
    first = axes[0][0]
    first.set_yticks(
        range(len(panels[0])), [row["name"].removesuffix(f" {directions[0]}") for row in panels[0]]
    )
    first.set_ylim(len(panels[0]) - 0.4, -0.6)
    _legend(figure, first, "outside upper center")
    figure.supxlabel(_conditions(result), color="#666666", fontsize=10)
    return figure
