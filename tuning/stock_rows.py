"""Reads the measurements that speed rules are fitted to."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from tuning.boxes import Features, features

RESULTS = Path(__file__).parent / "results"
# The file of each peer, and the name of its column there. A peer without a file has no rules yet.
MEASURED = {
    "flash": (RESULTS / "h200_stock.csv", "stock_us"),
    "cudnn": (RESULTS / "h200_cudnn.csv", "cudnn_us"),
}


@dataclass(frozen=True)
class Row(Features):
    """A measured problem."""

    head_dim_v: int
    peer: str
    ratio: float  # our time over the peer's


def lines(peer: str) -> list[dict[str, str]]:
    """Returns the lines of the peer's file. Those of the decode kernel count against cuDNN alone,
    because no rule leaves them to flash: docs/kernels-sm90.md has their measurements."""
    path, _ = MEASURED[peer]
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [
            line for line in csv.DictReader(file) if peer == "cudnn" or line["kernel"] != "decode"
        ]


def row_of(line: dict[str, str], peer: str) -> Row:
    _, column = MEASURED[peer]
    decode = {"op": "decode"} if line["kernel"] == "decode" else {}
    return Row(
        **features(line) | decode,
        head_dim_v=int(line.get("head_dim_v", line["head_dim"])),
        peer=peer,
        ratio=float(line["ours_us"]) / float(line[column]),
    )


def read() -> list[Row]:
    """Returns the rows of all peers."""
    return [row_of(line, peer) for peer in MEASURED for line in lines(peer)]
