"""Checks keys and values in pages (block_table). Each sequence's pages lie anywhere in the cache,
and the kernels read them as they are."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from calls import (
    CACHES,
    TORCH_2_12,
    flash_forward_into,
    flash_forward_paged,
    own,
    own_forward,
    paged,
)
from cases import (
    DEVICE,
    DTYPES,
    HEAD_DIMS,
    MASKS,
    Inputs,
    Problem,
    cumulative,
    make_inputs,
    varlen,
)
from compare import assert_matches_reference
from profiling import kernels_of
from reference import Result

from fa4_ext.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

pytestmark = pytest.mark.usefixtures("strict")
PAGE_SIZES = (16, 32, 48, 64, 256)
NAN = float("nan")
MOST, LEAST = 2**31 - 1, -(2**31)


def check(problem: Problem, page_size: int, **options) -> None:
    inputs = make_inputs(problem)
    assert_matches_reference(
        problem, inputs, flash_forward_paged(problem, inputs, page_size, **options)
    )


def used(problem: Problem) -> torch.Tensor:
    return torch.tensor(problem.seqlens_k, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "mask", "page_size"),
    list(product(DTYPES, HEAD_DIMS, MASKS, PAGE_SIZES)),
    ids=str,
)
class TestMatrix:
    def test_few_queries(self, dtype, head_dim, mask, page_size):
        fields = dict(dtype=DTYPES[dtype], head_dim=head_dim, heads=8, heads_kv=2, **MASKS[mask])
        lengths = (1000, 77, page_size, 5, 2 * page_size + 1)
        check(varlen((1, 4, 1, 0, 2), lengths, **fields), page_size)

    def test_many_queries(self, dtype, head_dim, mask, page_size):
        """Prompts, chunks of prompts behind keys of before, steps among them, and none."""
        fields = dict(dtype=DTYPES[dtype], head_dim=head_dim, heads=4, heads_kv=2, **MASKS[mask])
        check(
            varlen((700, 513, 1, 0, 130, 64), (700, 1500, 777, 40, 2 * page_size, 5), **fields),
            page_size,
        )


@pytest.mark.parametrize("by", ("seqused_k", "cum_seq_k"))
@pytest.mark.parametrize("heads", ((1, 1), (14, 1), (32, 8), (40, 40)), ids=str)
@pytest.mark.parametrize("queries", (1, 600))
def test_lengths_and_heads(heads, by, queries):
    """Without seqused_k, cum_seq_k says how many keys each sequence has, though not where."""
    lengths = (1, 63, 64, 65, 128, 129, 700, 2048, 4100)
    fields = dict(heads=heads[0], heads_kv=heads[1], is_causal=queries > 1)
    check(varlen((queries,) * 9, lengths, **fields), 128, by=by)


@pytest.mark.parametrize("page_size", (16, 64))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dims", ((192, 128), (40, 120), (72, 72), (8, 248)), ids=str)
def test_head_dims(head_dims, mask, page_size):
    fields = dict(head_dim=head_dims[0], head_dim_v=head_dims[1], heads=4, heads_kv=2)
    check(varlen((600, 3), (650, 300), **fields, **MASKS[mask]), page_size)


@pytest.mark.parametrize("queries", (1, 40, 600))
@pytest.mark.parametrize("page_size", (16, 64))
@pytest.mark.parametrize("cache", CACHES)
def test_caches_of_other_layouts(cache, page_size, queries):
    check(
        varlen((queries,) * 3, (900, 77, 602), heads=8, heads_kv=2, is_causal=True),
        page_size,
        cache=cache,
    )


@pytest.mark.parametrize("number", range(60))
def test_random(number, seed):
    draw = random.Random(f"{seed} {number}")
    heads_kv, batch, longest = draw.choice((1, 2, 3)), draw.randint(1, 9), draw.choice((70, 900))
    head_dim, head_dim_v = (8 * draw.randint(1, 32) for _ in range(2))
    if draw.random() < 0.7:
        head_dim = head_dim_v = draw.choice(HEAD_DIMS)

    def lengths() -> list[int]:
        return [draw.choice((0, 1, draw.randint(1, longest))) for _ in range(batch)]

    problem = varlen(
        [*lengths(), longest],
        [*lengths(), draw.randint(1, 2 * longest)],
        dtype=DTYPES[draw.choice(list(DTYPES))],
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        heads=heads_kv * draw.choice((1, 2, 5)),
        heads_kv=heads_kv,
        **MASKS[draw.choice(list(MASKS))],
    )
    check(
        problem,
        16 * draw.randint(1, 20),
        by=draw.choice(("seqused_k", "cum_seq_k")),
        nowhere=draw.choice((-1, MOST, LEAST)),
        num_splits=draw.choice((0, 0, 1, 3)),
    )


@pytest.mark.parametrize("queries", (1, 600))
@pytest.mark.parametrize("page_size", (16, 64, 48))
@pytest.mark.parametrize("nowhere", (MOST, LEAST, 10**6))
def test_entries_that_no_length_reaches_are_not_read(nowhere, page_size, queries):
    check(varlen((queries,) * 3, (901, 7, 640), heads=4, heads_kv=2), page_size, nowhere=nowhere)


@pytest.mark.parametrize("queries", (1, 600))
@pytest.mark.parametrize("page_size", (16, 64))
def test_pages_that_the_cache_does_not_have_are_zeros(page_size, queries):
    problem = varlen((queries, queries), (300, 300), heads=4, heads_kv=2)
    inputs = make_inputs(problem)
    k, v, table = paged(problem, inputs, page_size)
    nowhere = torch.tensor([MOST, LEAST, -1, len(k)], dtype=torch.int32, device=DEVICE).repeat(9)
    table[1, ::2] = nowhere[: len(table[1, ::2])]
    for sequence, (rows_k, rows_v) in enumerate(
        zip(inputs.k.split(problem.seqlens_k), inputs.v.split(problem.seqlens_k), strict=True)
    ):
        for page in range(0, 300 // page_size + 1, 2) if sequence else ():
            for rows in (rows_k, rows_v):
                rows[page * page_size : (page + 1) * page_size] = 0
    cached = Inputs(inputs.q, k, v, inputs.do, inputs.cu_seqlens_q, None)
    result = own_forward(problem, cached, seqused_k=used(problem), block_table=table)
    assert_matches_reference(problem, inputs, Result(*result))


@pytest.mark.parametrize("queries", (1, 600))
@pytest.mark.parametrize("page_size", (16, 64))
def test_lengths_beyond_the_table_are_clamped(page_size, queries):
    problem = varlen((queries, queries), (640, 640), heads=4, heads_kv=2)
    inputs = make_inputs(problem)
    k, v, table = paged(problem, inputs, page_size)
    table = table[:, : 640 // page_size].contiguous()
    cached = Inputs(inputs.q, k, v, inputs.do, inputs.cu_seqlens_q, None)

    def attend(lengths):
        lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        return own_forward(problem, cached, seqused_k=lengths, block_table=table)

    whole = attend([640, 640])
    assert_matches_reference(problem, inputs, Result(*whole))
    for lengths in ([641, MOST], [10**6, 10**9]):
        for ours, expected in zip(attend(lengths), whole, strict=True):
            assert torch.equal(ours, expected)
    out, lse = attend([-5, LEAST])
    assert not out.any() and lse.isneginf().all()


@pytest.mark.parametrize("page_size", (16, 256))
@pytest.mark.parametrize("mask", MASKS)
def test_garbage_in_offsets_does_not_fault(mask, page_size):
    fields = dict(heads=4, heads_kv=2, **MASKS[mask])
    problem = varlen((300, 129, 600), (300, 700, 77), **fields)
    inputs = make_inputs(problem)
    k, v, table = paged(problem, inputs, page_size)
    for values in ([0, 300, 429, 10**6], [MOST] * 4, [-7, -300, LEAST, 1029], [1029, 300, 200, 0]):
        garbage = torch.tensor(values, dtype=torch.int32, device=DEVICE)
        for q_by, k_by in ((garbage, None), (inputs.cu_seqlens_q, garbage), (garbage, garbage)):
            cached = Inputs(inputs.q, k, v, inputs.do, q_by, k_by)
            known = {"seqused_k": used(problem)} if k_by is None else {}
            own_forward(problem, cached, block_table=table, **known)
            torch.cuda.synchronize()
    check(problem, page_size)


@pytest.mark.parametrize("num_splits", (1, 2, 5, 16, 40))
@pytest.mark.parametrize("page_size", (16, 256))
def test_number_of_splits_is_the_caller_s(num_splits, page_size):
    check(varlen((1, 1), (3000, 130), heads=8, heads_kv=2), page_size, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", (0, 1, 2))
def test_many_queries_take_any_number_of_splits(num_splits):
    check(
        varlen((600, 3), (3000, 130), heads=8, heads_kv=2, is_causal=True),
        64,
        num_splits=num_splits,
    )


@pytest.mark.parametrize("longest", (100, 1000))
@pytest.mark.parametrize("page_size", (16, 256))
def test_one_split_does_not_depend_on_the_rest_of_the_batch(page_size, longest):
    fields = dict(heads=8, heads_kv=2)
    problem = varlen((1, 1, longest), (3000, 130, 900), **fields)
    inputs = make_inputs(problem)
    together = flash_forward_paged(problem, inputs, page_size, num_splits=1)
    alone = varlen((1,), (3000,), **fields)
    first = Inputs(inputs.q[:1], inputs.k[:3000], inputs.v[:3000], inputs.do[:1], cumulative([1]))
    assert torch.equal(
        flash_forward_paged(alone, first, page_size, num_splits=1).out, together.out[:1]
    )


@pytest.mark.parametrize(("queries", "op"), ((1, "decode"), (2000, "forward")))
@pytest.mark.parametrize("page_size", (16, 256))
def test_a_single_kernel_reads_the_pages(page_size, queries, op):
    problem = varlen((queries, 1), (2700, 130), heads=8, heads_kv=2)
    inputs = make_inputs(problem)
    k, v, table = paged(problem, inputs, page_size)
    cached = Inputs(inputs.q, k, v, inputs.do, inputs.cu_seqlens_q, None)
    known = {"seqused_k": used(problem), "block_table": table}
    kernels = kernels_of(lambda: own_forward(problem, cached, **known))
    named = [name for name in kernels if "emset" not in name]
    assert len(named) == 1 and op in named[0], kernels


@pytest.mark.skipif(not TORCH_2_12, reason="torch has the op since 2.12")
@pytest.mark.parametrize("queries", (3, 700))
def test_into_the_caller_s_tensor(queries):
    problem = varlen((1, queries), (700, 730), heads=8, heads_kv=2)
    inputs = make_inputs(problem)
    expected = flash_forward_paged(problem, inputs, 256)
    k, v, table = paged(problem, inputs, 256)
    out = torch.full_like(inputs.q, NAN)
    cached = Inputs(inputs.q, k, v, inputs.do, inputs.cu_seqlens_q, None)
    lse = flash_forward_into(out, problem, cached, seqused_k=used(problem), block_table=table)
    assert torch.equal(out, expected.out) and torch.equal(lse, expected.lse)


@pytest.mark.parametrize("queries", (1, 600))
@pytest.mark.parametrize("page_size", (16, 64))
def test_flash_attn_with_kvcache(page_size, queries):
    """Batched queries, whose new keys are written into the pages first."""
    before, new = (700, 33), queries
    problem = varlen(
        (queries,) * 2, tuple(n + new for n in before), heads=8, heads_kv=2, is_causal=True
    )
    inputs = make_inputs(problem)
    k, v, table = paged(problem, inputs, page_size)
    of_k, of_v = (
        torch.stack([rows[-new:] for rows in packed.split(problem.seqlens_k)])
        for packed in (inputs.k, inputs.v)
    )
    for sequence, length in enumerate(before):  # the function puts them there
        for row in range(length, length + new):
            for cache in (k, v):
                cache[table[sequence, row // page_size], row % page_size] = NAN
    out, lse = flash_attn_with_kvcache(
        inputs.q.unflatten(0, (2, queries)),
        k,
        v,
        of_k,
        of_v,
        cache_seqlens=torch.tensor(before, dtype=torch.int32, device=DEVICE),
        block_table=table,
        causal=True,
        return_lse=True,
    )
    result = Result(out.flatten(0, 1), lse.transpose(0, 1).flatten(1))
    assert_matches_reference(problem, inputs, result)


def test_flash_attn_varlen_func():
    problem = varlen((700, 3), (900, 77), heads=8, heads_kv=2, is_causal=True)
    inputs = make_inputs(problem)
    k, v, table = paged(problem, inputs, 16)
    out, lse = flash_attn_varlen_func(
        inputs.q, k, v, inputs.cu_seqlens_q, None, 700, 900,
        seqused_k=used(problem), block_table=table, causal=True, return_lse=True,
    )  # fmt: skip
    assert_matches_reference(problem, inputs, Result(out, lse))


def test_a_graph_replays_with_other_pages_and_lengths():
    problem = varlen((600, 30), (900, 77), heads=8, heads_kv=2, is_causal=True)
    inputs = make_inputs(problem)
    k, v, table = paged(problem, inputs, 16)
    lengths = used(problem)
    cached = Inputs(inputs.q, k, v, inputs.do, inputs.cu_seqlens_q, None)

    def attend():
        return own_forward(problem, cached, seqused_k=lengths, block_table=table)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    table.copy_(table.flip(0))
    lengths.copy_(lengths.flip(0))
    graph.replay()
    for ours, expected in zip(captured, attend(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("page_size", "reason"),
    [
        (100, "a page of block_table must hold a multiple of 16 keys, holds 100"),
        (8, "a page of block_table must hold a multiple of 16 keys, holds 8"),
    ],
)
@pytest.mark.parametrize("queries", (1, 700))
def test_what_is_not_ours_says_why(page_size, reason, queries):
    problem = varlen((queries,), (1000,), heads=8, heads_kv=2)
    with pytest.raises(RuntimeError, match=reason):
        flash_forward_paged(problem, make_inputs(problem), page_size)


def test_a_cache_that_tma_cannot_address_says_why():
    """Rows of heads that are no multiples of 16 bytes apart."""
    problem = varlen((600,), (600,), heads=2, heads_kv=2)
    inputs = make_inputs(problem)
    k, v, table = paged(problem, inputs, 64)
    k = torch.nn.functional.pad(k, (0, 4))[..., :-4]
    reason = "paged key and value must have addresses and strides of multiples of 16 bytes"
    answer, _, why = own.explain(
        inputs.q, k, v, inputs.cu_seqlens_q, None, 600, 600, 0.0, False, False, None, -1, -1,
        used(problem), None, table, None, False, False, True, 0, 0, own=True,
    )[:3]  # fmt: skip
    assert (answer, why) == (False, reason)
