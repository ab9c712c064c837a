"""Checks few queries against many keys, as in decoding, against fp32: the kernel that packs heads
into a tile and splits the keys."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from calls import flash_forward, planned, run_flash
from cases import (
    DTYPES,
    HEAD_DIMS,
    MASKS,
    UNEQUAL_HEAD_DIMS,
    Problem,
    dense,
    make_inputs,
    varlen,
)
from compare import assert_matches_reference
from profiling import kernels_of
from reference import compute

from fa4_ext import _library

pytestmark = pytest.mark.usefixtures("strict")

ROWS = 64  # of the large tile: queries times the heads that share a key/value head


@pytest.fixture(autouse=True)
def decode():
    """The planner takes the kernel where it is the faster one; here it runs wherever it can."""
    with _library.override(decode=1):
        yield


HEADS = {"mha": (6, 6), "gqa": (16, 4), "mqa": (14, 1)}


def check(problem: Problem) -> None:
    assert max(problem.seqlens_q) * problem.heads // problem.heads_kv <= ROWS
    inputs = make_inputs(problem)
    assert planned(problem, inputs) == "decode"
    assert_matches_reference(problem, inputs, run_flash(problem, inputs, backward=False))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "mask", "heads", "queries"),
    list(product(DTYPES, HEAD_DIMS, MASKS, HEADS, (1, 4))),
    ids=str,
)
def test_matrix(dtype, head_dim, mask, heads, queries):
    fields = dict(
        dtype=DTYPES[dtype],
        head_dim=head_dim,
        heads=HEADS[heads][0],
        heads_kv=HEADS[heads][1],
        **MASKS[mask],
    )
    check(dense(queries, 461, **fields))
    check(varlen((queries, 1, 0, queries), (129, 900, 64, 3), **fields))


@pytest.mark.parametrize(
    "head_dims",
    [(8, 8), (40, 40), (72, 72), (120, 120), (136, 136), (232, 232), *UNEQUAL_HEAD_DIMS],
    ids=str,
)
def test_head_dims(head_dims):
    fields = dict(head_dim=head_dims[0], head_dim_v=head_dims[1], heads=8, heads_kv=2)
    check(dense(3, 203, is_causal=True, **fields))
    check(varlen((1, 3, 2), (500, 65, 7), **fields))


@pytest.mark.parametrize("seqlen_k", (1, 2, 63, 64, 65, 127, 128, 129, 191, 1023, 4224))
@pytest.mark.parametrize("queries", (1, 2, 7, 16, 64))
@pytest.mark.parametrize("mask", MASKS)
def test_lengths(mask, queries, seqlen_k):
    """There are more queries than keys too: rows that see no key are 0, and -inf in the
    logsumexp."""
    check(dense(queries, seqlen_k, heads=2, heads_kv=2, **MASKS[mask]))


@pytest.mark.parametrize("heads_kv", (1, 2, 3, 5, 8, 13, 33, 50, 66, 100, 131, 132, 140, 300))
def test_every_number_of_splits(heads_kv):
    """The keys of a head are split by how many SMs the heads leave idle: 16 ways for the first, not
    for the last."""
    check(dense(1, 2100, batch=1, heads=heads_kv, heads_kv=heads_kv, head_dim=64))


@pytest.mark.parametrize("ratio", (1, 2, 3, 5, 6, 7, 8, 16, 21, 32, 33, 64))
def test_head_ratios(ratio):
    queries = ROWS // ratio
    check(dense(queries, 777, heads=2 * ratio, heads_kv=2, is_causal=True))
    check(varlen((queries, 1), (300, 2000), heads=ratio, heads_kv=1))


@pytest.mark.parametrize(
    ("queries", "ratio"), [(1, 16), (16, 1), (4, 4), (5, 3), (1, 17), (17, 1), (6, 3)]
)
def test_rows_around_those_of_the_small_tile(queries, ratio):
    for head_dim in HEAD_DIMS:
        fields = dict(heads=2 * ratio, heads_kv=2, head_dim=head_dim, is_causal=True)
        check(dense(queries, 777, **fields))
        check(varlen((queries, 1), (300, 2000), **fields))


@pytest.mark.parametrize(
    ("queries", "ratio"), [(65, 1), (100, 3), (64, 7), (200, 2), (512, 1), (32, 16), (500, 5)]
)
def test_more_rows_than_a_tile(queries, ratio):
    """A tile's last query may be another than the next one's first."""
    for problem in (
        dense(queries, 777, heads=2 * ratio, heads_kv=2, is_causal=True),
        varlen(
            (queries, 1, queries // 2), (300, 2000, 65), heads=ratio, heads_kv=1, window=(100, 30)
        ),
    ):
        inputs = make_inputs(problem)
        assert planned(problem, inputs) == "decode"
        assert_matches_reference(problem, inputs, run_flash(problem, inputs, backward=False))


@pytest.mark.parametrize(
    "window",
    [(0, 0), (1, 0), (0, 1), (5, -1), (-1, 5), (64, 64), (127, 0), (1000, 3), (5000, 5000)],
    ids=str,
)
@pytest.mark.parametrize("seqlens", [(4, 2000), (9, 130), (33, 17)], ids=str)
def test_windows(seqlens, window):
    check(dense(*seqlens, heads=2, heads_kv=2, window=window))
    check(varlen((seqlens[0], 2), (seqlens[1], 700), heads=2, heads_kv=2, window=window))


def test_as_many_sequences_as_a_grid_holds():
    problem = varlen((1,) * 65_535, (2,) * 65_535, heads=1, heads_kv=1, head_dim=8)
    inputs = make_inputs(problem)
    out, lse = flash_forward(problem, inputs)[:2]
    q, k, v = (
        inputs.q.float(),
        inputs.k.float().unflatten(0, (-1, 2)),
        inputs.v.float().unflatten(0, (-1, 2)),
    )
    scores = (q[:, None] * k).sum(-1).squeeze(-1) * problem.softmax_scale
    torch.testing.assert_close(lse[0], scores.logsumexp(-1), atol=5e-4, rtol=0)
    truth = (scores.softmax(-1)[..., None, None] * v).sum(1)
    torch.testing.assert_close(out.float(), truth, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("heads_kv", (1, 40, 200))
def test_strides(heads_kv):
    """The cache has rows with room, heads first, and batch entries of no stride."""
    problem = dense(2, 300, heads=2 * heads_kv, heads_kv=heads_kv, head_dim=64, batch=2)
    inputs = make_inputs(problem)
    inputs.k = torch.randn(
        2, heads_kv, 512, 64, dtype=problem.dtype, device=inputs.k.device
    ).transpose(1, 2)[:, :300]
    inputs.v = torch.randn(1, 300, heads_kv, 128, dtype=problem.dtype, device=inputs.v.device)[
        ..., :64
    ].expand(2, -1, -1, -1)
    inputs.q = inputs.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert_matches_reference(problem, inputs, run_flash(problem, inputs, backward=False))


def test_nan_of_a_neighbouring_sequence_stays_there():
    """The last key block of a sequence reaches into the next sequence, whose values may be
    anything."""
    problem = varlen((1, 1, 1), (70, 65, 130), heads=4, heads_kv=1)
    inputs = make_inputs(problem)
    clean = make_inputs(problem)
    for name in ("q", "k", "v"):
        getattr(clean, name).copy_(getattr(inputs, name))
    for tensor in (inputs.k, inputs.v):
        tensor[70:135] = float("nan")
    out, lse = flash_forward(problem, inputs)[:2]
    truth = compute(problem, clean, torch.float32, backward=False)
    assert out[1].isnan().all()
    for sequence in (0, 2):
        torch.testing.assert_close(out[sequence].float(), truth.out[sequence], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse[:, sequence], truth.lse[:, sequence], atol=5e-4, rtol=0)


def test_the_same_bits_in_every_run():
    problem = dense(1, 5000, heads=8, heads_kv=2, batch=3)
    inputs = make_inputs(problem)
    first = flash_forward(problem, inputs)
    for _ in range(20):
        again = flash_forward(problem, inputs)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_single_kernel_and_nothing_else_runs():
    problem = dense(1, 5000, heads=8, heads_kv=2)
    inputs = make_inputs(problem)
    (kernel,) = kernels_of(lambda: flash_forward(problem, inputs))
    assert "decode" in kernel


def test_in_a_cuda_graph():
    problem = dense(1, 3000, heads=32, heads_kv=8)
    inputs = make_inputs(problem)
    flash_forward(problem, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flash_forward(problem, inputs)
    inputs.q.normal_()
    graph.replay()
    expected = flash_forward(problem, inputs)
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])
