"""Reads and writes result files: JSON, from which every other output can be made again, and CSV.

A result is a dict: header, what the numbers depend on; grid, its name; contenders, {name: label};
throughput, rows of throughput.measure; and, where asked for, host, rows of host.measure.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator

from fa4_ext.bench.grids import GRIDS

COLUMNS = (
    "grid", "name", "direction", "layout", "batch", "heads", "heads_kv", "seqlen_q", "seqlen_k",
    "head_dim", "causal", "mask", "dtype",
    "contender", "ms", "spread", "tflops", "relative_error", "error",
)  # fmt: skip


def load(path: str, option: str) -> dict:
    """Returns the result in a JSON file. `option` is the command's option that named it.

    Raises:
        ValueError: the file cannot be read or holds no result.
    """
    try:
        with open(path) as file:
            result = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"argument {option}: {path} could not be read: {error}") from error
    missing = [
        key
        for key in ("header", "grid", "contenders", "throughput")
        if not isinstance(result, dict) or key not in result
    ]
    if missing:
        raise ValueError(
            f"argument {option}: {path} is no result of this command: it has no "
            f"{', '.join(missing)}"
        )
    if result["grid"] not in GRIDS:
        raise ValueError(
            f"argument {option}: {path} is of grid {result['grid']!r}, which is none of "
            f"{', '.join(GRIDS)}"
        )
    return result


def save(result: dict, path: str) -> None:
    with open(path, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


def lines(result: dict) -> Iterator[dict]:
    """Yields a CSV line for each row and contender."""
    for row in result["throughput"]:
        for contender, measured in row["results"].items():
            yield (
                row
                | {
                    "grid": result["grid"],
                    "dtype": result["header"]["dtype"],
                    "contender": contender,
                }
                | measured
            )


def write_csv(result: dict, path: str) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines(result))
