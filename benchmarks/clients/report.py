"""Shows what the workloads gave, as a table and as a figure."""

from __future__ import annotations

from benchmarks.clients.contenders import CONTENDERS

BASELINES = ("torch", "eager")  # what runs without fa4_ext
WITHOUT = ("torch", "flash", "cudnn", "efficient", "eager")
OURS = ("import", "fa4_ext")
COLOURS = {"import": "#e0a39b", "fa4_ext": "#c0392b"}


def speed_ups(results: dict[str, dict], key: str) -> dict[str, float]:
    """Returns the baseline's time over each of ours, by contender; nothing without a baseline."""
    base = next((results[name] for name in BASELINES if key in results.get(name, {})), None)
    if base is None:
        return {}
    return {name: base[key] / results[name][key] for name in OURS if key in results.get(name, {})}


def best_without(results: dict[str, dict]) -> float | None:
    """Returns the GPU time of the fastest contender without fa4_ext."""
    times = [results[name]["gpu_ms"] for name in WITHOUT if "gpu_ms" in results.get(name, {})]
    return min(times, default=None)


def share_of_ours(result: dict) -> float | None:
    """Returns which part of attention's GPU time our kernels spend; None without attention."""
    times = result.get("attention_ms", {})
    return times.get("fa4_ext", 0.0) / sum(times.values()) if times else None


def worst_error(result: dict) -> float:
    return max(result["error_over_math"].values())


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def table(clients: dict[str, dict]) -> list[str]:
    """Returns the lines of a table in Markdown: a row for each workload and way of ours."""
    lines = [
        "| workload | with | step | GPU time | GPU time over the best backend's | attention on "
        "fa4_ext | error over math's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in clients.items():
        steps, gpu = (speed_ups(results, key) for key in ("step_ms", "gpu_ms"))
        for contender in OURS:
            result = results.get(contender)
            if result is None:
                continue
            label = CONTENDERS[contender].label
            if "failed" in result:
                lines.append(f"| {name} | {label} | failed: {result['failed']} | | | | |")
                continue
            best, share = best_without(results), share_of_ours(result)
            over_best = result["gpu_ms"] / best if best and "gpu_ms" in result else None
            cells = (
                _number(steps.get(contender)),
                _number(gpu.get(contender)),
                _number(over_best),
                _number(share, ".0%"),
                _number(worst_error(result)),
            )
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    return lines


def draw(result: dict, path: str) -> None:
    """Writes a figure of the speed-ups over PyTorch without fa4_ext, in GPU time. A step's time has
    that of the host besides, which differs between runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ups = {name: speed_ups(found, "gpu_ms") for name, found in result["clients"].items()}
    names = [name for name, found in ups.items() if found]
    figure, axis = pyplot.subplots(figsize=(8, 0.42 * len(names) + 1.4), layout="constrained")
    for index, contender in enumerate(OURS):
        places = [row + (index - 0.5) * 0.38 for row in range(len(names))]
        lengths = [ups[name].get(contender, 0.0) for name in names]
        label = CONTENDERS[contender].label
        axis.barh(places, lengths, 0.38, label=label, color=COLOURS[contender])
    axis.axvline(1.0, color="#444444", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("GPU time of a step without fa4_ext over that with it")
    axis.legend()
    axis.set_title(f"{result['header']['device']}, bf16, torch {result['header']['torch']}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
