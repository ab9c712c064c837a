"""Checks keys and values in pages (block_table). Each sequence's pages lie anywhere in the cache,
and decoding reads them as they are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from calls import TORCH_2_12, aten, flash_forward_into, flash_forward_paged, paged
from cases import BLACKWELL, DEVICE, DTYPES, HEAD_DIMS, MASKS, Inputs, Problem, make_inputs, varlen
from compare import assert_matches_reference
from profiling import kernels_of

pytestmark = [
    pytest.mark.usefixtures("strict"),
    pytest.mark.skipif(BLACKWELL, reason="the decode kernel is for Hopper"),
    pytest.mark.skipif(not TORCH_2_12, reason="torch takes a block_table since 2.12"),
]
PAGE_SIZES = (64, 128, 256, 384)
NAN = float("nan")


def check(problem: Problem, page_size: int, **options) -> None:
    inputs = make_inputs(problem)
    assert_matches_reference(
        problem, inputs, flash_forward_paged(problem, inputs, page_size, **options)
    )


@pytest.mark.parametrize(
    ("dtype", "head_dim", "mask", "page_size"),
    list(product(DTYPES, HEAD_DIMS, MASKS, PAGE_SIZES)),
    ids=str,
)
def test_matrix(dtype, head_dim, mask, page_size):
    fields = dict(dtype=DTYPES[dtype], head_dim=head_dim, heads=8, heads_kv=2, **MASKS[mask])
    check(varlen((1, 4, 1, 0, 2), (1000, 77, page_size, 5, 2 * page_size + 1), **fields), page_size)


@pytest.mark.parametrize("by", ("seqused_k", "cum_seq_k"))
@pytest.mark.parametrize("heads", ((1, 1), (14, 1), (32, 8), (40, 40)), ids=str)
def test_lengths_and_heads(heads, by):
    """Without seqused_k, cum_seq_k says how many keys each sequence has, though not where."""
    check(
        varlen(
            (1,) * 9, (1, 63, 64, 65, 128, 129, 700, 2048, 4100), heads=heads[0], heads_kv=heads[1]
        ),
        128,
        by=by,
    )


@pytest.mark.parametrize("num_splits", (1, 2, 5, 16, 40))
def test_number_of_splits_is_the_caller_s(num_splits):
    check(varlen((1, 1), (3000, 130), heads=8, heads_kv=2), 256, num_splits=num_splits)


def test_one_split_does_not_depend_on_the_rest_of_the_batch():
    fields = dict(heads=8, heads_kv=2)
    problem = varlen((1, 1, 100), (3000, 130, 900), **fields)
    inputs = make_inputs(problem)
    together = flash_forward_paged(problem, inputs, 256, num_splits=1)
    alone = varlen((1,), (3000,), **fields)
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    first = Inputs(inputs.q[:1], inputs.k[:3000], inputs.v[:3000], inputs.do[:1], cu_seqlens, None)
    assert torch.equal(flash_forward_paged(alone, first, 256, num_splits=1).out, together.out[:1])


def test_a_single_kernel_reads_the_pages():
    problem = varlen((1, 1), (700, 130), heads=8, heads_kv=2)
    inputs = make_inputs(problem)
    k, v, table = paged(problem, inputs, 256)
    used = torch.tensor(problem.seqlens_k, dtype=torch.int32, device=DEVICE)
    kernels = kernels_of(
        lambda: aten._flash_attention_forward(
            inputs.q,
            k,
            v,
            inputs.cu_seqlens_q,
            None,
            1,
            700,
            0.0,
            False,
            False,
            seqused_k=used,
            block_table=table,
        )
    )
    assert len(kernels) == 1 and "decode" in kernels[0]


def test_into_the_caller_s_tensor():
    problem = varlen((1, 3), (700, 130), heads=8, heads_kv=2)
    inputs = make_inputs(problem)
    expected = flash_forward_paged(problem, inputs, 256)
    k, v, table = paged(problem, inputs, 256)
    out = torch.full_like(inputs.q, NAN)
    used = torch.tensor(problem.seqlens_k, dtype=torch.int32, device=DEVICE)
    cached = Inputs(inputs.q, k, v, inputs.do, inputs.cu_seqlens_q, None)
    lse = flash_forward_into(out, problem, cached, seqused_k=used, block_table=table)
    assert torch.equal(out, expected.out) and torch.equal(lse, expected.lse)


@pytest.mark.parametrize(
    ("page_size", "queries", "reason"),
    [
        (100, 1, "a page of block_table must hold a multiple of 64 keys, holds 100"),
        (256, 700, r"paged KV \(block_table\) is supported for at most 512 queries, here 700"),
    ],
)
def test_what_is_not_ours_says_why(page_size, queries, reason):
    problem = varlen((queries,), (1000,), heads=8, heads_kv=2)
    with pytest.raises(RuntimeError, match=reason):
        flash_forward_paged(problem, make_inputs(problem), page_size)
