"""Reads the measurements that speed rules are fitted to."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from kernels.kernel import HEAD_DIM_BUCKETS
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


def bucket(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """Returns the head dims of the kernel that runs these."""
    return min(
        (of_q, of_v)
        for of_q, of_v in HEAD_DIM_BUCKETS[90]
        if of_q >= head_dim and of_v >= head_dim_v
    )


def top_left(queries: int, keys: int) -> dict:
    """Returns the features of a call to cuDNN with a causal mask, which is aligned top-left. The
    planner sees the keys that some query sees, and a window where there are more queries than
    keys."""
    return {"keys": min(queries, keys), "mask": "window" if queries > keys else "causal"}


def row_of(line: dict[str, str], peer: str) -> Row:
    _, column = MEASURED[peer]
    head_dim, head_dim_v = bucket(
        int(line["head_dim"]), int(line.get("head_dim_v", line["head_dim"]))
    )
    found = features(line) | {"head_dim": head_dim}
    if line["kernel"] == "decode":
        found["op"] = "decode"
    if peer == "cudnn" and line["causal"] == "True":
        found |= top_left(found["queries"], found["keys"])
    return Row(
        **found,
        head_dim_v=head_dim_v,
        peer=peer,
        ratio=float(line["ours_us"]) / float(line[column]),
    )


def read() -> list[Row]:
    """Returns the rows of all peers."""
    return [row_of(line, peer) for peer in MEASURED for line in lines(peer)]
