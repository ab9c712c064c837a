"""One command, one run: `python -m benchmarks.attention --json out.json --figure out.png,out.svg`.

Ours against PyTorch's flash attention, cuDNN and, when importable, flash-attn-4 and FlashAttention-3, in one process and in turns.
--grid dims is the same grid for head dims 96, 192 and 256, device time only. --grid rules measures ours against stock where ours
may lose, for the planner's speed rules; --grid uncovered what registering does to calls that our kernels do not cover.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

os.environ["FA4_EXT_AUTOREGISTER"] = "0"  # ours is registered only while it is measured

import torch

import fa4_ext
from benchmarks import figure, grids, host, rules, startup, throughput, uncovered
from benchmarks.contenders import contenders
from benchmarks.timing import stream

RULES_BUDGET_S = 260


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def header(rounds: int) -> dict:
    """What the numbers depend on."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    state = _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0").split(", ")
    return {
        "device": torch.cuda.get_device_name(),
        **dict(zip(query.split(","), state, strict=False)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "build": fa4_ext.build_info(),
        "matmul_tflops": round(throughput.matmul_ceiling(rounds), 1),
        "rounds": rounds,
        "date": time.strftime("%Y-%m-%d"),
    }


def _line(name: str, cells: list[str]) -> None:
    print(f"{name:<34}" + "".join(f"{cell:>14}" for cell in cells))


def print_report(report: dict) -> None:
    names = list(report["contenders"])
    _line("TFLOP/s (spread of the rounds)", names)
    for row in report["throughput"]:
        results = [row["results"].get(name, {}) for name in names]
        _line(row["name"], [f"{r['tflops']:.0f} ({r['spread']:.1%})" if "tflops" in r else "-" for r in results])
    for name in names:
        speeds = {row["name"]: row["speed_of_ours"][name] for row in report["throughput"] if name in row["speed_of_ours"]}
        if speeds:
            mean, worst = statistics.geometric_mean(speeds.values()), min(speeds, key=speeds.get)
            print(f"ours over {name}: {mean:.3f} in geometric mean, {speeds[worst]:.3f} at worst ({worst})")
    if "host" in report:
        print()
        _line("host microseconds a call", names)
        for row in report["host"]:
            _line(row["name"], [f"{row['us'][name]:.1f}" if name in row["us"] else "-" for name in names])
    if "startup" in report:
        print()
        first = report["startup"]["first_call"]
        titles = {
            "import, s": "import_s",
            "first forward+backward, s": "first_call_s",
            "beyond stock's, s": "beyond_stock_s",
        }
        for title, key in titles.items():
            _line(title, [f"{first[name][key]:.3f}" if key in first.get(name, {}) else "-" for name in names])
        imports = report["startup"]["import_s"]
        print(", ".join(f"import {name}: {seconds:.3f} s" for name, seconds in imports.items()), end="")
        print(f"; fa4_ext itself: {1e3 * report['startup']['import_beyond_torch_s']:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=("paper", "dims", "rules", "uncovered"), default="paper")
    parser.add_argument("--quick", action="store_true", help="a part of the grid, fewer rounds")
    parser.add_argument("--rounds", type=int, help="timed rounds (7; with --quick or --grid rules 5)")
    parser.add_argument("--contenders", help="names, separated by commas (all that are installed)")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--csv", metavar="PATH", help="of --grid rules: adds what the file lacks")
    parser.add_argument("--figure", metavar="PATH[,PATH]", help="png, svg or pdf")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.attention needs a CUDA device")
    rounds = arguments.rounds or (5 if arguments.quick or arguments.grid == "rules" else 7)
    chosen = contenders()
    if arguments.contenders:
        chosen = [contender for contender in chosen if contender.name in arguments.contenders.split(",")]
    with torch.cuda.stream(stream()):
        report = {"header": header(rounds), "grid": arguments.grid}
        print(json.dumps(report["header"]))
        if arguments.grid == "rules":
            problems = grids.rules(arguments.quick)
            if arguments.csv:
                problems = rules.without_measured(problems, arguments.csv)
            report["rows"] = rules.measure(problems, rounds, RULES_BUDGET_S)
            rules.print_table(report["rows"])
        elif arguments.grid == "uncovered":
            report["rows"] = uncovered.measure(rounds)
            uncovered.print_table(report["rows"])
        else:
            report["contenders"] = {contender.name: contender.label for contender in chosen}
            grid = grids.paper if arguments.grid == "paper" else grids.dims
            report["throughput"] = throughput.measure(chosen, grid(arguments.quick), rounds)
            if arguments.grid == "paper":
                report["host"] = host.measure(chosen, 10 if arguments.quick else 40)
                samples = (1, 3) if arguments.quick else (5, 5)
                report["startup"] = startup.measure([contender.name for contender in chosen], *samples)
            print_report(report)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)
    if arguments.csv and arguments.grid == "rules" and report["rows"]:
        rules.write_csv(report["rows"], arguments.csv)
    if arguments.figure and arguments.grid == "paper":
        figure.draw(report, arguments.figure.split(","))


if __name__ == "__main__":
    main()
