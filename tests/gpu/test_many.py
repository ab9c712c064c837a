"""More batch entries, sequences or heads than a grid's second and third dimension hold, 65,535."""

from __future__ import annotations

import pytest
import torch
from calls import TORCH_2_12, deterministic, flash_forward, run_flash
from cases import HEADS, MASKS, Inputs, Problem, cumulative, dense, make_inputs, varlen
from compare import assert_matches_reference
from reference import Result

import fa4_ext

pytestmark = pytest.mark.usefixtures("strict")


def check(problem: Problem) -> None:
    x = make_inputs(problem)
    assert_matches_reference(problem, x, run_flash(problem, x, backward=True))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", (65_535, 65_536, 70_001))
def test_batch(batch, heads):
    check(
        dense(
            16,
            16,
            batch=batch,
            heads=HEADS[heads][0],
            heads_kv=HEADS[heads][1],
            head_dim=64,
            is_causal=True,
        )
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", (128, 256))
def test_batch_of_other_kernels(head_dim, mask):
    check(dense(7, 9, batch=65_537, heads=2, heads_kv=1, head_dim=head_dim, **MASKS[mask]))


def test_batch_deterministic():
    with deterministic():
        check(dense(16, 16, batch=70_001, heads=2, heads_kv=1, head_dim=64, is_causal=True))


@pytest.mark.parametrize("heads", ("mha", "gqa"))
def test_sequences(heads):
    check(
        varlen(
            (16,) * 80_000,
            heads=HEADS[heads][0],
            heads_kv=HEADS[heads][1],
            head_dim=64,
            is_causal=True,
        )
    )


@pytest.mark.parametrize("heads", ("mha", "gqa"))
def test_sequences_deterministic(heads):
    with deterministic():
        check(varlen((3,) * 70_001, heads=HEADS[heads][0], heads_kv=HEADS[heads][1], head_dim=64))


@pytest.mark.parametrize("heads", [(65_536, 65_536), (70_001, 70_001), (140_000, 70_000)], ids=str)
def test_heads(heads):
    check(dense(16, 16, batch=1, heads=heads[0], heads_kv=heads[1], head_dim=64, is_causal=True))


def test_heads_and_batch_that_lie_apart():
    """A slice of a launch begins where the strides say."""
    problem = dense(5, 5, batch=65_540, heads=2, heads_kv=2, head_dim=64)
    x = make_inputs(problem)
    spread = {name: torch.empty(2, *getattr(x, name).shape[:1], 5, 2, 64, dtype=problem.dtype,
    device="cuda")[1] for name in vars(x)
              if getattr(x, name) is not None}  # fmt: skip
    y = Inputs(
        *(
            spread[name].copy_(getattr(x, name)).transpose(1, 2).contiguous().transpose(1, 2)
            for name in ("q", "k", "v", "do")
        )
    )
    assert_matches_reference(problem, x, run_flash(problem, y, backward=True))


@pytest.mark.parametrize("layout", ("dense", "packed"))
def test_decode(layout):
    """The decode kernel has the batch in a grid's third dimension."""
    batch = 66_000
    fields = dict(heads=8, heads_kv=2, head_dim=64)
    problem = (
        dense(1, 40, batch=batch, **fields)
        if layout == "dense"
        else varlen((1,) * batch, (40,) * batch, **fields)
    )
    x = make_inputs(problem)
    with fa4_ext._library.override(decode=1):
        out, lse = flash_forward(problem, x)[:2]
    assert_matches_reference(problem, x, Result(out, lse))


@pytest.mark.skipif(not TORCH_2_12, reason="torch has block_table since 2.12")
def test_decode_in_pages():
    batch, pages = 66_000, 300
    q = torch.randn(batch, 4, 64, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(pages, 128, 1, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    table = torch.randint(pages, (batch, 1), dtype=torch.int32, device="cuda")
    used = torch.randint(1, 129, (batch,), dtype=torch.int32, device="cuda")
    cu_seqlens = cumulative((1,) * batch)
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, None, 1, 128, 0.0, False, False, block_table=table, seqused_k=used
    )[0]
    picked = torch.tensor([0, 1, 65_534, 65_535, 65_536, batch - 1], device="cuda")
    for i in picked.tolist():
        keys, values = (t[table[i, 0], : used[i], 0].float() for t in (k, v))
        expected = torch.softmax(q[i].float() @ keys.T / 8, -1) @ values
        torch.testing.assert_close(out[i].float(), expected, atol=2e-2, rtol=2e-2)
