"""Checks the persistent forward against fp32, mostly with more tiles than SMs: CTAs go from one
tile to the next."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from calls import flash_forward, planned, run_flash
from cases import BLACKWELL, DTYPES, HEAD_DIMS, HEADS, MASKS, Problem, dense, make_inputs, varlen
from compare import assert_matches_reference
from profiling import kernels_of
from reference import Result

from fa4_ext import _library

pytestmark = [
    pytest.mark.usefixtures("strict"),
    pytest.mark.skipif(BLACKWELL, reason="the persistent kernel is for Hopper"),
]

LAUNCHES, SEED = 1000, 20261122


@pytest.fixture(autouse=True)
def not_decoded():
    with _library.override(decode=-1):
        yield


def check(problem: Problem) -> None:
    inputs = make_inputs(problem)
    assert planned(problem, inputs) == "forward"
    assert_matches_reference(problem, inputs, run_flash(problem, inputs, backward=False))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "mask", "heads"), list(product(DTYPES, HEAD_DIMS, MASKS, HEADS)), ids=str
)
def test_matrix(dtype, head_dim, mask, heads):
    query_heads, heads_kv = HEADS[heads]
    check(
        dense(
            1150,
            1150,
            batch=40,
            heads=query_heads,
            heads_kv=heads_kv,
            dtype=DTYPES[dtype],
            head_dim=head_dim,
            **MASKS[mask],
        )
    )


@pytest.mark.parametrize("sequences", (1, 31, 32, 33, 64, 150))
@pytest.mark.parametrize(
    ("head_dim", "mask", "heads"), list(product((64, 128, 256), MASKS, HEADS)), ids=str
)
def test_packed_sequences(head_dim, mask, heads, sequences):
    """The sequences have any lengths, 0 among them, and are in groups of 32 as the tiles are found;
    there are from fewer tiles than SMs to many."""
    query_heads, heads_kv = HEADS[heads]
    chosen = random.Random(f"{head_dim} {mask} {heads} {sequences}")
    lengths = (0, 1, (1, 200), (1, 30_000 // sequences))
    rows, keys = (
        [
            chosen.randint(*length) if isinstance(length, tuple) else length
            for length in chosen.choices(lengths, k=sequences)
        ]
        for _ in "qk"
    )
    # At least one sequence has rows and keys.
    rows[0] = keys[0] = 600
    check(
        varlen(rows, keys, heads=query_heads, heads_kv=heads_kv, head_dim=head_dim, **MASKS[mask])
    )


@pytest.mark.parametrize("blocks", range(1, 8))
@pytest.mark.parametrize("heads", (67, 134, 263, 397))
def test_pairs(blocks, heads):
    """Heads have odd and even numbers of tiles, with and without pairs, and no wave divides the
    heads."""
    check(
        dense(
            128 * blocks - 5, 128 * blocks - 5, batch=1, heads=heads, heads_kv=heads, is_causal=True
        )
    )


@pytest.mark.parametrize("blocks", (2, 3, 5))
@pytest.mark.parametrize("head_dim", (64, 256))
@pytest.mark.parametrize("causal", (True, False))
def test_every_schedule_gives_the_same_bits(causal, head_dim, blocks):
    lengths = (256 * blocks - 5,) * 2
    inputs = make_inputs(
        problem := dense(
            *lengths, batch=3, heads=41, heads_kv=41, head_dim=head_dim, is_causal=causal
        )
    )
    expected = run_flash(problem, inputs, backward=False)
    assert_matches_reference(problem, inputs, expected)
    sm_count, heads = torch.cuda.get_device_properties(0).multi_processor_count, 3 * 41
    for schedule in product((1, 7, sm_count - 1, sm_count), (0, 1, heads // 2, heads)):
        with _library.override(schedule=schedule):
            result = run_flash(problem, inputs, backward=False)
        assert torch.equal(result.out, expected.out) and torch.equal(result.lse, expected.lse), (
            schedule
        )


@pytest.mark.parametrize("lengths", [(1700, 300), (300, 1700), (1000, 1), (2500, 130)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_unequal_lengths(mask, lengths):
    """There are tiles without a key beside tiles with some."""
    check(dense(*lengths, batch=30, heads=4, heads_kv=2, head_dim=64, **MASKS[mask]))


@pytest.mark.parametrize(
    "window",
    [(0, 0), (1, 0), (63, 64), (127, 0), (128, 128), (300, -1), (-1, 200), (500, 500)],
    ids=str,
)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_windows(head_dim, window):
    check(dense(1100, 1100, batch=40, head_dim=head_dim, window=window))


def test_rising_scores_rescale_every_block():
    """Keys that grow along the sequence raise the row's reference in every key block; shrinking
    ones never do."""
    for order in (slice(None), slice(None, None, -1)):
        problem = dense(900, 900, batch=20, head_dim=64)
        inputs = make_inputs(problem)
        ramp = torch.linspace(0.1, 12, problem.max_k, device="cuda")
        inputs.k.mul_(ramp[:, None, None].flip(0) if order.step else ramp[:, None, None])
        assert_matches_reference(problem, inputs, run_flash(problem, inputs, backward=False))


def random_problem(chosen: random.Random) -> Problem:
    heads_kv = chosen.choice((1, 2, 3, 8))
    rows, keys = (
        chosen.choice((chosen.randint(1, 300), chosen.randint(1, 1500))) for _ in range(2)
    )
    fields = dict(
        heads=heads_kv * chosen.choice((1, 2, 5)), heads_kv=heads_kv,
        head_dim=8 * chosen.randint(1, 32),
        dtype=chosen.choice(list(DTYPES.values())), **chosen.choice(list(MASKS.values())),
    )  # fmt: skip
    if chosen.random() < 0.4:
        return varlen(
            [rows] + [chosen.randint(0, rows) for _ in range(chosen.randint(0, 40))], **fields
        )
    return dense(rows, chosen.choice((rows, keys)), batch=chosen.randint(1, 6), **fields)


def test_launches_of_random_shapes_back_to_back():
    """Calls are launched without waiting in between, then checked: none may touch what is
    another's. Some, of few queries, run on the decode kernel, so that both follow each other."""
    chosen = random.Random(SEED)
    with _library.override(decode=0):
        for _ in range(LAUNCHES // 50):
            problems = [random_problem(chosen) for _ in range(50)]
            inputs = [make_inputs(problem) for problem in problems]
            torch.cuda.synchronize()
            results = [
                flash_forward(problem, x)[:2] for problem, x in zip(problems, inputs, strict=True)
            ]
            for problem, x, result in zip(problems, inputs, results, strict=True):
                assert_matches_reference(problem, x, Result(*result))


def test_runs_on_the_persistent_kernel():
    inputs = make_inputs(problem := dense(1000, 1000, batch=20))
    names = kernels_of(lambda: flash_forward(problem, inputs))
    assert len(names) == 1 and "sm90forward" in names[0], names
