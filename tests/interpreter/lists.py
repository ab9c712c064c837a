"""Runs only the kernels that list a bias's tiles, behind the fake device, and holds the lists to
what kernels/sm90/bias.py says of them, written out.

Reads a request from standard input:

    {"programs": {digest: PTX file} of these kernels, "queries": [queries, keys] of a tile in the
     lists for query tiles, "keys": the same in those for key blocks, or null in a forward,
     "calls": [{"problem": {...}, "seed": int}]}

Prints a line a call: what was wrong with it, or null.
"""

import ctypes
import json
import sys
from itertools import chain, product

import biases
import calls
import cases
import fa4_core
import numpy as np
import torch

import fa4_ext
from interpreter.attend import OnCpu, problem_of
from interpreter.launches import Device, device_code_at
from interpreter.sources import digest
from scripts.core_problem import core_problem

CELL, HEADER = 64, 4
FAR = 2.0**20  # from zero: care is taken with such a bias, if it is not hidden
FREE, BIASED, CAREFUL, CUT, HIDDEN = range(5)  # the kinds of tiles
SM_COUNT = 3


class Lister(Device):
    """Launches no other kernels. At the first of these it keeps what was allocated so far."""

    def begin(self, seed: int, lazy: bool) -> None:
        super().begin(seed, lazy)
        self.sizes: dict[int, int] = {}
        self.kept: list[bytes] = []

    def _allocated(self, data: int, size: int) -> None:
        super()._allocated(data, size)
        self.sizes[data] = size

    def _launch(self, code, *rest) -> int:
        if digest(device_code_at(code)) not in self.sources:
            self.kept = self.kept or [ctypes.string_at(*block) for block in self.sizes.items()]
            return 0
        return super()._launch(code, *rest)


def cells(bias: torch.Tensor) -> np.ndarray:
    """The class of each cell of [queries, keys]."""
    seen, finite = ~(bias <= biases.FILL), ~bias.isneginf()
    classes = []
    for first in range(0, len(bias), CELL):
        rows = slice(first, first + CELL)
        unseeing = (finite[rows].any(1) & ~seen[rows].any(1)).any()
        row = []
        for column in range(0, bias.shape[1], CELL):
            cell = rows, slice(column, column + CELL)
            listed = seen[cell].any() or (unseeing and finite[cell].any())
            low = unseeing and ((bias[cell] <= -FAR) & finite[cell]).any()
            high = ((bias[cell] >= FAR) & bias[cell].isfinite()).any()
            kind = CAREFUL if low or high else BIASED
            row.append(FREE if not bias[cell].any() else kind if listed else HIDDEN)
        classes.append(row)
    return np.array(classes)


def lists_of(kinds: np.ndarray) -> list[list[int]]:
    """Lists for each row of tiles: four numbers, and the tiles."""
    lists = []
    for row in kinds:
        groups = [[int(t) for t in np.flatnonzero(row == kind)] for kind in range(HIDDEN)]
        ends = np.cumsum([len(group) for group in groups]).tolist()
        lists.append([*ends, *chain(*groups)] if any(groups) else [0, 0, 1, 1, 0])
    return lists


def of_queries(classes: np.ndarray, tile: list[int], keys: int) -> list[list[int]]:
    height, width = (size // CELL for size in tile)
    rows, columns = -(-classes.shape[0] // height), -(-classes.shape[1] // width)
    kinds = np.full((rows, columns), BIASED)
    for r, c in np.ndindex(rows, columns):
        found = classes[r * height : (r + 1) * height, c * width : (c + 1) * width]
        if (found == FREE).all():
            kinds[r, c] = CUT if (c + 1) * tile[1] > keys else FREE
        elif (found == HIDDEN).all():
            kinds[r, c] = HIDDEN
        elif (found == CAREFUL).any() or (c + 1) * tile[1] > keys:
            kinds[r, c] = CAREFUL
    return lists_of(kinds)


def planned(problem: cases.Problem, sizes: list[int], *, backward: bool) -> fa4_core.Plan:
    fields = dict(
        op="backward" if backward else "forward", dtype="bf16", layout="dense", capability=90,
        batch=problem.batch, seqlen_q=problem.max_q, seqlen_k=problem.max_k,
        total_q=problem.batch * problem.max_q, total_k=problem.batch * problem.max_k,
        num_heads=problem.heads, num_heads_kv=problem.heads_kv, head_dim=problem.head_dim,
        head_dim_v=problem.head_dim, is_causal=False, window_size_left=-1, window_size_right=-1,
        deterministic=False, peer="cudnn", bias=sizes[:2], bias_by_query=sizes[2] > 1,
    )  # fmt: skip
    return fa4_core.plan(core_problem(fields), False)


def wrong(device: Lister, call: dict, request: dict) -> str | None:
    torch.manual_seed(call["seed"])
    problem, backward = problem_of(call["problem"]), request["keys"] is not None
    x = cases.make_inputs(problem)
    # The library must find out what is broadcast.
    whole = x.bias.expand(biases.full_sizes(problem))
    sizes = [1 if whole.stride(dim) == 0 else whole.shape[dim] for dim in range(3)]
    workspace = planned(problem, sizes, backward=backward).workspace
    device.begin(call["seed"], lazy=call["seed"] % 2 == 1)
    try:
        forward = calls.cudnn_forward(problem, x)
        if backward:
            device.begin(call["seed"], lazy=False)
            calls.cudnn_backward(problem, x, forward)
    except RuntimeError as error:
        return device.fault or str(error)
    (kept,) = (block for block in device.kept if len(block) == workspace.bytes)
    numbers = np.frombuffer(kept[: len(kept) // 4 * 4], np.int32)
    for by in ("queries", "keys") if backward else ("queries",):
        by_queries = by == "queries"
        counts = [
            -(-size // tile)
            for size, tile in zip((problem.max_q, problem.max_k), request[by], strict=True)
        ]
        rows, tiles = counts if by_queries else counts[::-1]
        if by_queries and sizes[2] == 1:
            rows = 1
        shape = *sizes[:2], rows, HEADER + tiles
        begin = (workspace.lists_q if by_queries else workspace.lists_k) // 4
        found = numbers[begin : begin + np.prod(shape)].reshape(shape)
        for batch, head in product(*map(range, sizes[:2])):
            classes = cells(whole[batch, head])
            expected = (
                of_queries(classes, request[by], problem.max_k)
                if by_queries
                else lists_of(classes.T)
            )
            # One list may be all query tiles'.
            lists = np.broadcast_to(found[batch, head], (len(expected), HEADER + tiles)).tolist()
            for index, (one, other) in enumerate(zip(expected, lists, strict=True)):
                given = other[: len(one)]
                if one != given:
                    return f"the list by {by} {batch, head, index} is {other}, expected {one}"
    return None


def main() -> None:
    request = json.load(sys.stdin)
    device = Lister(request["programs"], SM_COUNT, 90)
    cases.DEVICE, calls.aten = "cpu", OnCpu(torch.ops.aten, device)
    torch.set_num_threads(1)
    with fa4_ext.register(fallback="error", speed_rules=False):
        for call in request["calls"]:
            print(json.dumps(wrong(device, call, request)), flush=True)


if __name__ == "__main__":
    main()
