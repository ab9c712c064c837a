"""Makes a result of `python -m fa4_ext bench` that no GPU made."""

from __future__ import annotations

from fa4_ext.bench.grids import GRIDS
from fa4_ext.bench.throughput import speed_of_ours

LABELS = {"ours": "fa4_ext", "stock": "PyTorch flash (FA2)", "cudnn": "cuDNN 9.19"}
SLOWER = {"ours": 1.0, "stock": 2.0, "cudnn": 1.25}  # times as long as ours
FAILED = {"error": "RuntimeError('wrong: relative error 1.00e+00')"}
HEADER = {
    "device": "NVIDIA H200", "driver_version": "580.159.04", "clocks.sm": "1905 MHz",
    "clocks.max.sm": "1980 MHz",
    "clocks.mem": "3201 MHz", "power.limit": "700.00 W", "torch": "2.11.0+cu130", "cuda": "13.0",
    "cudnn": "9.19",
    "versions": {"ours": "0.1.0", "stock": "2.11.0+cu130", "cudnn": "9.19"},
    "build": {"version": "0.1.0", "commit": "0123456789abcdef"}, "dtype": "bf16",
    "matmul_tflops": 780.7, "rounds": 7,
    "date": "2026-11-22",
}  # fmt: skip
HOST = [
    {
        "name": "B1 H1 S128 D64 forward",
        "us": {"ours": 10.94, "stock": 12.8},
        "graph_nodes": {"ours": 1, "stock": 2, "cudnn": 3},
    }
]


def measured(shape, direction: str, seconds: float) -> dict:
    return {
        "ms": 1e3 * seconds, "spread": 0.0125, "captured": True, "relative_error": 0.004,
        "tflops": shape.flops(direction) / seconds / 1e12,
    }  # fmt: skip


def result(grid: str = "paper", speed: float = 500e12, host: bool = False) -> dict:
    """Returns a result in which ours computes `speed` operations a second in every row. cuDNN
    failed in the first row and has no varlen."""
    rows = []
    for shape in GRIDS[grid].shapes:
        for direction in GRIDS[grid].directions:
            times = {who: factor * shape.flops(direction) / speed for who, factor in SLOWER.items()}
            if shape.lengths:
                del times["cudnn"]
            results = {who: measured(shape, direction, seconds) for who, seconds in times.items()}
            if not rows and "cudnn" in times:
                results["cudnn"] = FAILED
                del times["cudnn"]
            fields = {key: value for key, value in vars(shape).items() if key != "lengths"} | {
                "layout": shape.layout
            }
            row = {"name": f"{shape.name} {direction}", "direction": direction, "results": results}
            rows.append(
                fields
                | row
                | {
                    "speed_of_ours": speed_of_ours(
                        {who: [seconds] for who, seconds in times.items()}
                    )
                }
            )
    found = {"header": HEADER, "grid": grid, "contenders": LABELS, "throughput": rows}
    return found | {"host": HOST} if host else found
