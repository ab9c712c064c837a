"""Measures every candidate of kernels/matrix.py beside its default and PyTorch's flash attention,
the stock kernel. tuning/fit_tiles.py fits the tile rules to these rows.

make build KERNELS=tuning    # needs no GPU; leaves fa4_ext/libfa4_ext.so
python -m tuning.tiles --csv tuning/results/h200_tiles.csv
python -m tuning.fit_tiles   # writes kernels/tile_rules.csv

The second command measures with that library on a GPU; repeat it until nothing is missing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from fa4_ext import _library
from fa4_ext.bench.contenders import ours_enabled
from fa4_ext.bench.correctness import MAX_RELATIVE_ERROR
from fa4_ext.bench.shapes import Shape
from fa4_ext.bench.timing import in_turns, prepare, sets_for, summary
from kernels.kernel import Kernel, Mask, Op
from kernels.matrix import candidates
from tuning import rows, tiles_grid
from tuning.calls import agree, calls, fields_of, make_inputs
from tuning.tiles_grid import defaults, tile

TARGET_MS = 1.0
ROUNDS = 5
# Runs of a millisecond leave the device cool enough.
PAUSE_S = 0.005
BUDGET_S = 60  # seconds of a run; the next one adds what is missing

Problem = tuple[str, str, Shape]  # direction, dtype, shape


def grid(default: Kernel) -> list[Problem]:
    found = tiles_grid.problems(default.head_dim, default.mask is Mask.CAUSAL, default.block_m)
    return list(
        dict.fromkeys(
            (default.op.value, dtype, shape) for dtype, shape in found if is_for(default, shape)
        )
    )


def is_for(default: Kernel, shape: Shape) -> bool:
    """Returns whether a problem runs on this default. On Hopper, forwards of up to 64 queries have
    a default tile of their own."""
    short = default.op is Op.FORWARD and max(shape.lengths or (shape.seqlen_q,)) <= 64
    return shape.layout == default.layout.value and not short


def key(problem: Problem) -> dict[str, str]:
    direction, dtype, shape = problem
    return {
        name: str(value)
        for name, value in (fields_of(shape) | {"dtype": dtype, "direction": direction}).items()
    }


def missing(path: str | None) -> list[tuple[Kernel, Problem]]:
    """Returns the problems that a file lacks, in a random order, so that a run cut short has seen a
    fair sample; all of them if there is no file."""
    every = [(kernel, problem) for kernel in defaults() for problem in grid(kernel)]
    there = rows.measured(path, key(every[0][1]))
    left = [
        (kernel, problem) for kernel, problem in every if tuple(key(problem).values()) not in there
    ]
    random.Random(0).shuffle(left)
    return left


@contextmanager
def forced(kernel: Kernel) -> Iterator[None]:
    with ours_enabled(), _library.override(tile=(kernel.block_m, kernel.block_n)):
        yield


def _rows(pair: tuple[Kernel, Problem]) -> list[dict]:
    """Measures a problem, and returns a row for each candidate."""
    default, problem = pair
    direction, dtype, shape = problem
    sets = [make_inputs(shape, dtype) for _ in range(sets_for(shape.bytes))]
    call = calls(shape, sets, ours_enabled)[direction]
    enabled = {
        tile(kernel): partial(forced, kernel) for kernel in (default, *candidates(default))
    } | {"stock": nullcontext}
    prepared, outputs = {}, {}
    for name, on in enabled.items():
        prepared[name] = prepare(call, len(sets), on, TARGET_MS)
        with on():
            outputs[name] = call(0)[: 1 if direction == "forward" else 3]
    for kernel in candidates(default):
        agree(outputs[tile(kernel)], outputs[tile(default)], MAX_RELATIVE_ERROR[dtype])
    us = {
        name: round(summary(times)["ms"] * 1e3, 3)
        for name, times in in_turns(prepared, ROUNDS, PAUSE_S).items()
    }
    shared = {
        "default_tile": tile(default),
        "default_us": us[tile(default)],
        "stock_us": us["stock"],
    }
    shared |= {"gflop": round(shape.flops(direction) / 1e9, 3)}
    return [
        key(problem) | shared | {"tile": tile(kernel), "us": us[tile(kernel)]}
        for kernel in candidates(default)
    ]


def print_table(found: list[dict]) -> None:
    """Prints the rows on which a candidate is faster than the default, best first."""
    faster = sorted(
        (row for row in found if row["us"] < row["default_us"]),
        key=lambda row: row["us"] / row["default_us"],
    )
    print(f"{len(faster)} of {len(found)} rows are faster than the default; the best:")
    for row in faster[:40]:
        print(
            f"  {row['layout']:6} {row['direction']:8} {row['dtype']} "
            f"{'causal' if row['causal'] == 'True' else 'full':6} "
            f"B{row['batch']:<4} H{row['heads']}/{row['heads_kv']:<3} q{row['seqlen_q']:<6} "
            f"d{row['head_dim']:<4} "
            f"{row['tile']:8} {row['us']:9.1f} us  {row['default_tile']:8} "
            f"{row['default_us']:9.1f} us  "
            f"stock {row['stock_us']:9.1f} us  {row['default_us'] / row['us']:.3f}x"
        )


def main() -> None:
    arguments = rows.parser(__doc__, BUDGET_S).parse_args()
    problems = missing(arguments.csv)
    print_table(rows.run(arguments, problems, _rows, lambda pair: " ".join(key(pair[1]).values())))
    if arguments.csv:
        print(f"{len(missing(arguments.csv))} problems are left")


if __name__ == "__main__":
    main()
