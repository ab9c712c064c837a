"""A forward's tiles, dealt out to the thread blocks in several ways: the planner's choice among
them is held to these rows.

python -m benchmarks.dealings --csv benchmarks/results/h200_dealings.csv
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil, gcd
from statistics import geometric_mean

import torch

from benchmarks import rows
from benchmarks.rules import calls, make_inputs
from benchmarks.tune_grid import HIDDEN, SM_COUNT
from fa4_ext import _library
from fa4_ext.bench.contenders import ours_enabled
from fa4_ext.bench.session import NO_DEVICE, session
from fa4_ext.bench.shapes import Shape, square
from fa4_ext.bench.timing import in_turns, prepare, sets_for, summary
from kernels.kernel import Kernel, Layout, Mask
from kernels.matrix import matrix
from kernels.sm90 import tiles

TARGET_MS = 1.0
ROUNDS = 5
PAUSE_S = 0.005  # runs of a millisecond leave the device cool enough
BUDGET_S = 260  # of a run; the next one adds what is missing
LENGTHS = (256, 384, 512, 640, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
TOKENS = (4096, 8192, 16384)
# without a mask: one round and a half, in which half the multiprocessors could wait
FEW_TOKENS = 2048
MANY_TOKENS, THEIR_LENGTHS = 65536, (512, 1024, 2048, 4096)
GROUPS = (1, 2, 4, 8)  # query heads that share a key/value head
LONGEST_FIRST = 5  # rounds of the multiprocessors, less one, that are at most left out of the pairs

# the columns that tell problems apart
PROBLEM = ("head_dim", "tile", "batch", "heads", "heads_kv", "seqlen_q", "causal")

# Ways to deal out, with a causal mask or without one: of a problem's rows the one with the least of
# this.
ALWAYS = (
    ("causal: no pairs", True, lambda row: (row["paired"], -row["workers"])),
    ("causal: all in pairs", True, lambda row: (-row["paired"], -row["workers"])),
    ("full: to all multiprocessors", False, lambda row: -row["workers"]),
)

Problem = tuple[Kernel, Shape]
# thread blocks; heads, over the batch, whose tiles are dealt out in pairs
Dealing = tuple[int, int]


def kernels() -> list[Kernel]:
    """Of one dtype. Tiles of 64 rows are for calls whose heads have one tile."""
    found = (
        k
        for k in matrix()
        if k.persistent and k.layout is Layout.DENSE and k.mask is not Mask.WINDOW
    )
    return [k for k in found if k.dtype == "bf16" and k.head_dim == k.head_dim_v and k.block_m > 64]


def problems(kernel: Kernel) -> list[Problem]:
    """Of one hidden size. Under a causal mask with as many heads of keys as of queries, and with
    fewer where that divides them."""
    causal = kernel.mask is Mask.CAUSAL
    tokens = TOKENS if causal else (FEW_TOKENS, *TOKENS)
    sizes = [(seqlen, some) for seqlen in LENGTHS for some in tokens] + [
        (seqlen, MANY_TOKENS) for seqlen in THEIR_LENGTHS
    ]
    heads = HIDDEN // kernel.head_dim
    return [
        (
            kernel,
            square(some // seqlen, heads, seqlen, kernel.head_dim, causal, heads_kv=heads // group),
        )
        for group in (GROUPS if causal else GROUPS[:1])
        for seqlen, some in sizes
        if heads % group == 0 and some >= seqlen
    ]


def dealings(kernel: Kernel, shape: Shape) -> list[Dealing]:
    heads, blocks = shape.batch * shape.heads, ceil(shape.seqlen_q / kernel.block_m)
    return (
        in_pairs(heads, tiles.units(blocks)) if shape.causal else unpaired(heads * blocks, blocks)
    )


def unpaired(count: int, blocks: int) -> list[Dealing]:
    """Of that many tiles, `blocks` a head, to all multiprocessors, to as few as need no more
    rounds, and to the most and the fewest of these that share no factor with a head's tiles, so
    that each gets some last ones."""
    fewest = ceil(count / ceil(count / SM_COUNT))
    alternating = [workers for workers in range(fewest, SM_COUNT + 1) if gcd(workers, blocks) == 1]
    return sorted(
        {(workers, 0) for workers in (fewest, *alternating[:1], *alternating[-1:], SM_COUNT)}
    )


def in_pairs(heads: int, units: int) -> list[Dealing]:
    """`heads`: of all batch elements; `units`: pairs a head, and what has no other."""
    left = {max(heads * units - rounds * SM_COUNT, 0) // units for rounds in range(LONGEST_FIRST)}
    even = SM_COUNT // gcd(SM_COUNT, units)
    paired = {0, heads} | left | {count // even * even for count in left}
    fewest = ceil(heads * units / ceil(heads * units / SM_COUNT))
    alternating = max(count for count in range(1, SM_COUNT + 1) if gcd(count, units) == 1)
    return sorted({(SM_COUNT, count) for count in paired} | {(fewest, heads), (alternating, heads)})


def key(problem: Problem) -> dict[str, str]:
    kernel, shape = problem
    fields = vars(shape) | {"tile": f"{kernel.block_m}x{kernel.block_n}"}
    return {name: str(fields[name]) for name in PROBLEM}


def missing(path: str | None) -> list[Problem]:
    """What a file lacks, in a random order, so that a run cut short has seen a fair sample;
    everything when there is none."""
    every = [problem for kernel in kernels() for problem in problems(kernel)]
    there = rows.measured(path, key(every[0]))
    left = [problem for problem in every if tuple(key(problem).values()) not in there]
    random.Random(0).shuffle(left)
    return left


@contextmanager
def forced(kernel: Kernel, dealing: Dealing) -> Iterator[None]:
    with ours_enabled():
        _library.force_tile(kernel.block_m, kernel.block_n)
        _library.force_dealing(*dealing)
        try:
            yield
        finally:
            _library.force_dealing(0, 0)
            _library.force_tile(0, 0)


def _rows(problem: Problem) -> list[dict]:
    """A row a dealing, which must all give the same bits."""
    kernel, shape = problem
    sets = [make_inputs(shape, "bf16") for _ in range(sets_for(shape.bytes))]
    call = calls(shape, sets, ours_enabled)["forward"]
    prepared, first = {}, None
    for dealing in dealings(kernel, shape):
        enabled = partial(forced, kernel, dealing)
        prepared[dealing] = prepare(call, len(sets), enabled, TARGET_MS)
        with enabled():
            output = call(0)[0]
        first = output if first is None else first
        if not torch.equal(output, first):
            raise RuntimeError(f"dealt out as {dealing} the output has other bits")
    us = {
        dealing: round(summary(times)["ms"] * 1e3, 3)
        for dealing, times in in_turns(prepared, ROUNDS, PAUSE_S).items()
    }
    return [
        key(problem) | {"workers": workers, "paired": paired, "us": us[workers, paired]}
        for workers, paired in prepared
    ]


def print_table(found: list[dict]) -> None:
    """What always dealing out in the same way would cost."""
    by_problem: dict[tuple, list[dict]] = {}
    for row in found:
        by_problem.setdefault(tuple(row[name] for name in PROBLEM), []).append(row)
    print(
        f"{len(by_problem)} problems; the time beside the fastest dealing's, in geometric mean and "
        "at worst:"
    )
    for name, causal, pick in ALWAYS:
        chosen = [some for some in by_problem.values() if some[0]["causal"] == str(causal)]
        ratios = [min(some, key=pick)["us"] / min(row["us"] for row in some) for some in chosen]
        if ratios:
            print(f"  {name:30} {geometric_mean(ratios):.3f} {max(ratios):.3f}")


def main() -> None:
    arguments = rows.parser(__doc__, BUDGET_S).parse_args()
    if not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    left = missing(arguments.csv)
    with session():
        print_table(
            rows.measure(
                left,
                _rows,
                lambda problem: " ".join(key(problem).values()),
                arguments.budget,
                arguments.csv,
            )
        )


if __name__ == "__main__":
    main()
