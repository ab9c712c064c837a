"""Varlen keys of which only the first are in use (seqused_k), and that no sequence reads another's
rows or unused ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from calls import TORCH_2_12, flash_forward, flash_forward_into
from cases import (
    DEVICE,
    DTYPES,
    HEAD_DIMS,
    HEADS,
    MASKS,
    Inputs,
    Problem,
    make_inputs,
    poison,
    varlen,
)
from compare import assert_matches_reference
from fresh_process import run_script
from profiling import providers_of
from reference import Result

# The longest sequence has more than 512 queries: with fewer, so few heads are decoded.
QUERIES = (129, 1, 577, 64, 0, 7, 65)
CAPACITY = (512, 300, 330, 129, 64, 20, 1)
USED = (461, 300, 128, 0, 64, 1, 1)
MATRIX = list(product(DTYPES, HEAD_DIMS, MASKS, HEADS))


def used_of(lengths) -> torch.Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def cache(problem: Problem, used, junk: float = float("nan")) -> tuple[Inputs, Problem, Inputs]:
    """Makes inputs whose keys and values beyond `used` are junk, and the same problem without
    them."""
    inputs = make_inputs(problem)
    kept = {}
    for name in ("k", "v"):
        parts = getattr(inputs, name).split(problem.seqlens_k)
        kept[name] = torch.cat([part[:length] for part, length in zip(parts, used, strict=True)])
        for part, length in zip(parts, used, strict=True):
            part[length:] = junk
    compact = replace(problem, seqlens_k=tuple(used))
    return inputs, compact, replace(inputs, **kept)


def check(problem: Problem, used, **options) -> None:
    inputs, compact, compact_inputs = cache(problem, used, **options)
    poison(inputs)
    out, lse = flash_forward(problem, inputs, seqused_k=used_of(used))[:2]
    assert_matches_reference(compact, compact_inputs, Result(out, lse))


@pytest.mark.usefixtures("strict")
class TestUnusedKeys:
    @pytest.mark.parametrize(
        ("dtype", "head_dim", "mask", "heads"),
        MATRIX,
        ids=["-".join(map(str, row)) for row in MATRIX],
    )
    def test_matrix(self, dtype, head_dim, mask, heads):
        fields = dict(
            dtype=DTYPES[dtype],
            head_dim=head_dim,
            heads=HEADS[heads][0],
            heads_kv=HEADS[heads][1],
            **MASKS[mask],
        )
        check(varlen(QUERIES, CAPACITY, **fields), USED)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("head_dims", [(192, 128), (40, 120), (96, 72)], ids=str)
    def test_head_dims(self, head_dims, mask):
        check(
            varlen(
                QUERIES, CAPACITY, head_dim=head_dims[0], head_dim_v=head_dims[1], **MASKS[mask]
            ),
            USED,
        )

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize(
        "length",
        (
            0,
            1,
            79,
            80,
            81,
            95,
            96,
            97,
            111,
            112,
            127,
            128,
            129,
            143,
            145,
            255,
            256,
            257,
            1000,
            1024,
        ),
    )
    def test_decode_at_every_edge_of_a_tile(self, length, head_dim):
        check(
            varlen((1,) * 4, (1024,) * 4, heads=8, heads_kv=2, head_dim=head_dim, is_causal=True),
            (length, 1024, 7, length),
        )

    @pytest.mark.parametrize("junk", (float("inf"), -float("inf"), 3e4), ids=str)
    def test_junk(self, junk):
        check(varlen(QUERIES, CAPACITY, is_causal=True, dtype=torch.float16), USED, junk=junk)

    def test_all_in_use_is_none_given(self):
        problem = varlen(QUERIES, CAPACITY, is_causal=True)
        inputs = make_inputs(problem)
        given, none = (
            flash_forward(problem, inputs, seqused_k=used)[:2] for used in (used_of(CAPACITY), None)
        )
        assert torch.equal(given[0], none[0]) and torch.equal(given[1], none[1])

    def test_lengths_are_read_when_the_kernel_runs(self):
        """The lengths of a captured decode step grow between replays."""
        problem = varlen((1, 1), (512, 512), heads=8, heads_kv=2)
        inputs = make_inputs(problem)
        used = used_of((100, 511))
        flash_forward(problem, inputs, seqused_k=used)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = flash_forward(problem, inputs, seqused_k=used)[:2]
        for lengths in ((100, 511), (101, 512), (257, 3)):
            used.copy_(used_of(lengths))
            graph.replay()
            keys, values = (
                torch.cat(
                    [
                        part[:length]
                        for part, length in zip(t.split(problem.seqlens_k), lengths, strict=True)
                    ]
                )
                for t in (inputs.k, inputs.v)
            )
            assert_matches_reference(
                replace(problem, seqlens_k=lengths),
                replace(inputs, k=keys, v=values),
                Result(out, lse),
            )

    @pytest.mark.skipif(not TORCH_2_12, reason="torch 2.12 has the op")
    def test_in_place(self):
        problem = varlen(QUERIES, CAPACITY, is_causal=True)
        inputs, compact, compact_inputs = cache(problem, USED)
        out = torch.full_like(inputs.q, float("nan"))
        lse = flash_forward_into(out, problem, inputs, seqused_k=used_of(USED))
        assert_matches_reference(compact, compact_inputs, Result(out, lse))

    @pytest.mark.parametrize(
        ("used", "reason"),
        [
            (lambda: used_of(USED).long(), "seqused_k must be int32"),
            (lambda: used_of(USED[:-1]), "seqused_k must be 1D with batch elements"),
            (lambda: used_of(USED)[:, None], "seqused_k must be 1D with batch elements"),
            (lambda: used_of(USED).repeat_interleave(2)[::2], "seqused_k must be contiguous"),
            (lambda: used_of(USED).cpu(), "seqused_k must be on query's device"),
        ],
        ids=["int64", "short", "2d", "strided", "cpu"],
    )
    def test_what_is_not_ours(self, used, reason):
        problem = varlen(QUERIES, CAPACITY)
        with pytest.raises(
            RuntimeError, match=f"FA4 _flash_attention_forward unsupported: {reason}"
        ):
            flash_forward(problem, make_inputs(problem), seqused_k=used())


def test_as_stock():
    """The rows beyond the ones in use are finite, so that the comparison does not depend on how
    stock reads them."""
    import fa4_ext

    problem = varlen((64, 577, 7), (512, 700, 129), is_causal=True)
    inputs, _, _ = cache(problem, (461, 600, 9), junk=1.0)
    used = used_of((461, 600, 9))
    stock = flash_forward(problem, inputs, seqused_k=used)
    with fa4_ext.register(fallback="error", speed_rules=False):
        assert providers_of(lambda: flash_forward(problem, inputs, seqused_k=used)) == {"ours"}
        ours = flash_forward(problem, inputs, seqused_k=used)
    torch.testing.assert_close(ours[0], stock[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(ours[1], stock[1], atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("mask", MASKS)
def test_a_sequence_of_nans_stays_by_itself(mask, head_dim):
    """The lengths are no multiples of a tile: the last tile of the sequence before it ends in its
    rows."""
    problem = varlen(
        (129, 64, 65, 577),
        (129, 64, 65, 577),
        head_dim=head_dim,
        heads=2,
        heads_kv=1,
        **MASKS[mask],
    )
    inputs = make_inputs(problem)
    clean, clean_lse = flash_forward(problem, inputs)[:2]
    spoiled = replace(inputs, k=inputs.k.clone(), v=inputs.v.clone())
    rows = slice(129 + 64, 129 + 64 + 65)
    spoiled.k[rows] = spoiled.v[rows] = float("nan")
    out, lse = flash_forward(problem, spoiled)[:2]
    assert out[rows].isnan().all()
    others = torch.ones(out.shape[0], dtype=torch.bool, device=DEVICE)
    others[rows] = False
    wrong = (out[others] != clean[others]).sum()
    assert torch.equal(out[others], clean[others]), (
        f"{int(wrong)} elements of other sequences changed"
    )
    assert torch.equal(lse[:, others], clean_lse[:, others])


# These run in processes of their own, because a wrong address there would end this one's CUDA
# context.
ADDRESSES = """
    import torch
    from calls import flash_forward
    from cases import make_inputs, varlen
    from compare import assert_matches_reference
    from dataclasses import replace
    from reference import Result

    import fa4_ext

    fa4_ext.register(fallback="error", speed_rules=False)
    problem = varlen((577, 1, 64), (129, 0, 77), is_causal=True)
    inputs = make_inputs(problem)

    def apart(tensor, elements):
        memory = tensor.new_full((tensor.shape[0] * elements,), float("nan"))
        view = memory.as_strided(tensor.shape, (elements, tensor.stride(1), 1))
        return view.copy_(tensor)

    k, v = (apart(tensor, STRIDE) for tensor in (inputs.k, inputs.v))
    for given in (inputs, replace(inputs, k=k, v=v)):
        assert_matches_reference(problem, inputs, Result(*flash_forward(problem, given)[:2]))
"""


@pytest.mark.parametrize("stride", (2**10, 2**17, 2**20), ids=str)
@pytest.mark.parametrize("allocator", ("expandable_segments:False", "expandable_segments:True"))
def test_keys_far_apart_and_memory_at_any_address(allocator, stride):
    """TMA's view of a sequence reaches it by an address that wraps around."""
    run_script(ADDRESSES.replace("STRIDE", str(stride)), PYTORCH_CUDA_ALLOC_CONF=allocator)
