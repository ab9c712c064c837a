"""Kernels that only a tile rule chooses, forced: the rest of the suite meets few of the problems
that get them. With a library of the kernel subset "tuning" these are all candidates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from calls import flash_backward, flash_forward
from cases import DTYPES, HEADS, MASKS, Problem, dense, make_inputs, poison, varlen
from compare import assert_matches_reference
from reference import Result

from fa4_ext import _library

pytestmark = pytest.mark.usefixtures("strict")

TUNED = [row for row in _library.manifest() if row["tuned"]]
# Lengths of queries and of keys. A dense problem takes the first ones.
CASES = {
    "self_attention": ((577, 197, 1, 64, 129), (577, 197, 1, 64, 129)),
    "vit": ((197,) * 5, (197,) * 5),
    "long": ((4224, 799), (4224, 799)),
    "more_keys": ((239, 65, 3, 128), (799, 127, 63, 1023)),
    "more_queries": ((799, 129, 63, 300), (239, 1, 65, 128)),
    "empty": ((65, 0, 197, 0, 7), (63, 63, 0, 0, 129)),
}


@contextmanager
def forced(row: dict) -> Iterator[None]:
    with _library.override(tile=(row["block_m"], row["block_n"])):
        yield


def check(row: dict, case: str, head_dim: int) -> None:
    seqlens_q, seqlens_k = CASES[case]
    # A forward kernel takes both.
    grouped = row["grouped"] or row["op"] == "forward"
    heads, heads_kv = HEADS["gqa" if grouped else "mha"]
    fields = dict(
        dtype=DTYPES[row["dtype"]],
        head_dim=head_dim,
        heads=heads,
        heads_kv=heads_kv,
        **MASKS[row["mask"]],
    )
    packed = row["layout"] == "varlen"
    problem = (
        varlen(seqlens_q, seqlens_k, **fields)
        if packed
        else dense(seqlens_q[0], seqlens_k[0], **fields)
    )
    inputs = make_inputs(problem)
    assert_matches_reference(problem, inputs, run(row, problem, inputs))


def run(row: dict, problem: Problem, inputs) -> Result:
    poison(inputs)
    if row["op"] == "forward":
        with forced(row):
            return Result(*flash_forward(problem, inputs)[:2])
    forward = flash_forward(problem, inputs)
    poison(inputs)
    with forced(row):
        return Result(*forward[:2], *flash_backward(problem, inputs, forward))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("row", TUNED, ids=lambda row: row["name"])
def test_lengths(row, case):
    check(row, case, row["head_dim"])


@pytest.mark.parametrize("row", TUNED, ids=lambda row: row["name"])
def test_a_head_dim_below_the_bucket(row):
    check(row, "self_attention", row["head_dim"] - 24)
