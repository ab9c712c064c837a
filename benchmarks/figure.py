"""The figure of the README: TFLOP/s by sequence length, a panel per head dim, mask and direction."""

from __future__ import annotations

# The same hue for a contender in every figure; ours is the strong one.
COLOURS = {"ours": "#c0392b", "stock": "#b8bec6", "cudnn": "#76a95b", "fa4": "#5b8fd0", "fa3": "#9b7fc1"}


def draw(report: dict, paths: list[str]) -> None:
    """Writes the figure once per path; its suffix is the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, labels = report["throughput"], report["contenders"]
    columns = sorted({(row["head_dim"], row["causal"]) for row in rows})
    figure, axes = pyplot.subplots(2, len(columns), figsize=(4.2 * len(columns), 7), sharey="row", squeeze=False)
    width = 0.82 / len(labels)
    for line, direction in zip(axes, ("forward", "backward"), strict=True):
        for axis, (head_dim, causal) in zip(line, columns, strict=True):
            panel = [row for row in rows if (row["head_dim"], row["causal"], row["direction"]) == (head_dim, causal, direction)]
            panel.sort(key=lambda row: row["seqlen"])
            for index, (name, label) in enumerate(labels.items()):
                heights = [row["results"].get(name, {}).get("tflops", 0.0) for row in panel]
                places = [place + (index - (len(labels) - 1) / 2) * width for place in range(len(panel))]
                axis.bar(places, heights, width, label=label, color=COLOURS[name], zorder=2)
            axis.set_title(f"{direction}, head dim {head_dim}, {'causal' if causal else 'full'}", fontsize=11)
            axis.set_xticks(
                range(len(panel)), [f"{row['seqlen'] // 1024}k" if row["seqlen"] >= 1024 else str(row["seqlen"]) for row in panel]
            )
            axis.grid(axis="y", color="#e6e6e6", zorder=0)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=len(names), frameon=False, fontsize=11)
    header = report["header"]
    figure.text(
        0.5, 0.005, f"{header['device']}, bf16, 16k tokens, hidden size 2048, torch {header['torch']}", ha="center", color="#666666"
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.025, 1, 0.95))
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
