"""Measures a persistent forward under several tile schedules. tests/test_schedules.py holds the
planner's choice among them to these rows.

python -m tuning.schedules --csv tuning/results/h200_schedules.csv
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil, gcd
from statistics import geometric_mean

import torch

from fa4_ext import _library
from fa4_ext.bench.contenders import ours_enabled
from fa4_ext.bench.shapes import Shape, square
from fa4_ext.bench.timing import in_turns, prepare, sets_for, summary
from kernels.kernel import Kernel, Layout, Mask
from kernels.matrix import matrix
from kernels.sm90 import tiles
from tuning import rows
from tuning.calls import calls, make_inputs
from tuning.tiles_grid import HIDDEN, SM_COUNT, tile

TARGET_MS = 1.0
ROUNDS = 5
# Runs of a millisecond leave the device cool enough.
PAUSE_S = 0.005
BUDGET_S = 260  # seconds of a run; the next one adds what is missing
LENGTHS = (256, 384, 512, 640, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
TOKENS = (4096, 8192, 16384)
# Without a mask these tiles fill one wave and a half, in which half the SMs could wait.
FEW_TOKENS = 2048
MANY_TOKENS, THEIR_LENGTHS = 65536, (512, 1024, 2048, 4096)
GROUPS = (1, 2, 4, 8)  # query heads that share a key/value head
LPT_WAVES = 5  # up to one wave less than this is left out of the pairs

# The columns that tell problems apart.
PROBLEM = ("head_dim", "tile", "batch", "heads", "heads_kv", "seqlen_q", "causal")

# These schedules could always be taken, under a causal mask or without one. Each takes, of a
# problem's rows, the one with the least of this.
ALWAYS = (
    ("causal: no pairs", True, lambda row: (row["paired_heads"], -row["num_ctas"])),
    ("causal: all in pairs", True, lambda row: (-row["paired_heads"], -row["num_ctas"])),
    ("full: a CTA on every SM", False, lambda row: -row["num_ctas"]),
)

Problem = tuple[Kernel, Shape]
# A schedule is num_ctas and paired_heads: the heads, over the batch, whose tiles are taken in
# pairs.
Schedule = tuple[int, int]


def kernels() -> list[Kernel]:
    """Returns the kernels that are measured, in one dtype. Kernels with tiles of 64 rows are left
    out, because their calls have one tile per head."""
    found = (
        k
        for k in matrix()
        if k.persistent and k.layout is Layout.DENSE and k.mask in (Mask.FULL, Mask.CAUSAL)
    )
    return [k for k in found if k.dtype == "bf16" and k.head_dim == k.head_dim_v and k.block_m > 64]


def problems(kernel: Kernel) -> list[Problem]:
    """Returns the kernel's problems, of one hidden size. Under a causal mask they are MHA, and GQA
    where the ratio divides the heads."""
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


def schedules(kernel: Kernel, shape: Shape) -> list[Schedule]:
    heads, tiles_a_head = shape.batch * shape.heads, ceil(shape.seqlen_q / kernel.block_m)
    if shape.causal:
        return in_pairs(heads, tiles.units(tiles_a_head))
    return unpaired(heads * tiles_a_head, tiles_a_head)


def unpaired(count: int, tiles_a_head: int) -> list[Schedule]:
    """Returns the schedules of `count` tiles: on all SMs; on the fewest CTAs that do not add a
    wave; and, of the numbers of CTAs in between that share no factor with a head's tiles, on the
    smallest and the largest. With these every CTA gets some of the heads' last tiles."""
    fewest = ceil(count / ceil(count / SM_COUNT))
    alternating = [n for n in range(fewest, SM_COUNT + 1) if gcd(n, tiles_a_head) == 1]
    return sorted({(n, 0) for n in (fewest, *alternating[:1], *alternating[-1:], SM_COUNT)})


def in_pairs(heads: int, units: int) -> list[Schedule]:
    """Returns the schedules of causal tiles. `heads` counts the heads of all batch elements; a head
    has `units`: its pairs of a long and a short tile, and the unpaired tile if their number is
    odd."""
    left = {max(heads * units - waves * SM_COUNT, 0) // units for waves in range(LPT_WAVES)}
    even = SM_COUNT // gcd(SM_COUNT, units)
    paired = {0, heads} | left | {count // even * even for count in left}
    fewest = ceil(heads * units / ceil(heads * units / SM_COUNT))
    alternating = max(count for count in range(1, SM_COUNT + 1) if gcd(count, units) == 1)
    return sorted({(SM_COUNT, count) for count in paired} | {(fewest, heads), (alternating, heads)})


def key(problem: Problem) -> dict[str, str]:
    kernel, shape = problem
    fields = vars(shape) | {"tile": tile(kernel)}
    return {name: str(fields[name]) for name in PROBLEM}


def missing(path: str | None) -> list[Problem]:
    """Returns the problems that a file lacks, in a random order, so that a run cut short has seen a
    fair sample; all of them if there is no file."""
    every = [problem for kernel in kernels() for problem in problems(kernel)]
    there = rows.measured(path, key(every[0]))
    left = [problem for problem in every if tuple(key(problem).values()) not in there]
    random.Random(0).shuffle(left)
    return left


@contextmanager
def forced(kernel: Kernel, schedule: Schedule) -> Iterator[None]:
    tile = (kernel.block_m, kernel.block_n)
    with ours_enabled(), _library.override(tile=tile, schedule=schedule):
        yield


def _rows(problem: Problem) -> list[dict]:
    """Measures a problem, and returns a row for each schedule. All must give the same bits."""
    kernel, shape = problem
    sets = [make_inputs(shape, "bf16") for _ in range(sets_for(shape.bytes))]
    call = calls(shape, sets, ours_enabled)["forward"]
    prepared, first = {}, None
    for schedule in schedules(kernel, shape):
        enabled = partial(forced, kernel, schedule)
        prepared[schedule] = prepare(call, len(sets), enabled, TARGET_MS)
        with enabled():
            output = call(0)[0]
        first = output if first is None else first
        if not torch.equal(output, first):
            raise RuntimeError(f"under the schedule {schedule} the output has other bits")
    us = {
        schedule: round(summary(times)["ms"] * 1e3, 3)
        for schedule, times in in_turns(prepared, ROUNDS, PAUSE_S).items()
    }
    return [
        key(problem) | {"num_ctas": num_ctas, "paired_heads": paired, "us": us[num_ctas, paired]}
        for num_ctas, paired in prepared
    ]


def print_table(found: list[dict]) -> None:
    """Prints what always taking the same kind of schedule would cost."""
    by_problem: dict[tuple, list[dict]] = {}
    for row in found:
        by_problem.setdefault(tuple(row[name] for name in PROBLEM), []).append(row)
    print(
        f"{len(by_problem)} problems; the time beside the fastest schedule's, in geometric mean "
        "and at worst:"
    )
    for name, causal, pick in ALWAYS:
        chosen = [some for some in by_problem.values() if some[0]["causal"] == str(causal)]
        ratios = [min(some, key=pick)["us"] / min(row["us"] for row in some) for some in chosen]
        if ratios:
            print(f"  {name:30} {geometric_mean(ratios):.3f} {max(ratios):.3f}")


def main() -> None:
    arguments = rows.parser(__doc__, BUDGET_S).parse_args()
    problems = missing(arguments.csv)
    print_table(rows.run(arguments, problems, _rows, lambda p: " ".join(key(p).values())))


if __name__ == "__main__":
    main()
