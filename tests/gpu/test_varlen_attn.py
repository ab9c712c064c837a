"""torch.nn.attention.varlen, PyTorch's own front end of the varlen op. The variant with `out` is in
test_inplace.py."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import DTYPES, HEADS, make_inputs, varlen
from compare import assert_matches_reference
from profiling import providers_of
from reference import Result
from torch.nn.attention.varlen import AuxRequest, varlen_attn

pytestmark = pytest.mark.usefixtures("strict")

SEQLENS = (799, 65, 300, 1)
# These windows are those of PyTorch's own test: none, causal, one-sided, of one key, both sides,
# wider than every sequence.
WINDOWS = [
    (-1, -1),
    (-1, 0),
    (4, 0),
    (-1, 4),
    (0, 0),
    (1, 0),
    (0, 1),
    (0, -1),
    (4, 4),
    (8, 2),
    (1025, 1025),
]
# Torch 2.11 takes fewer key/value heads without being told; later versions ask for enable_gqa.
ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend(problem, x, **options):
    if ASKS_FOR_GQA:
        options["enable_gqa"] = problem.heads != problem.heads_kv
    longest = max(problem.seqlens_q), max(problem.seqlens_k)
    return varlen_attn(
        x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, *longest, scale=problem.scale,
        window_size=problem.window, **options
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window, heads, dtype):
    problem = varlen(
        SEQLENS,
        window=window,
        heads=HEADS[heads][0],
        heads_kv=HEADS[heads][1],
        head_dim=64,
        dtype=DTYPES[dtype],
    )
    inputs = make_inputs(problem)
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out, lse = attend(problem, inputs, return_aux=AuxRequest(lse=True))
    gradients = torch.autograd.grad(out, leaves, inputs.do)
    assert_matches_reference(problem, inputs, Result(out.detach(), lse.detach(), *gradients))


def test_scale():
    problem = varlen(SEQLENS, scale=0.1, window=(-1, 0))
    inputs = make_inputs(problem)
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out = attend(problem, inputs)
    gradients = torch.autograd.grad(out, leaves, inputs.do)
    assert_matches_reference(
        problem, inputs, Result(out.detach(), None, *gradients), check_lse=False
    )


def test_custom_ops_pass_opcheck():
    """It checks schema, fake tensors and tracing of the ops that call ours. As in PyTorch's own
    test the backward is not traced."""
    x = make_inputs(varlen((512, 512), head_dim=64))
    arguments = (x.cu_seqlens_q, x.cu_seqlens_k, 512, 512, False)
    ops = torch.ops.torch_attn
    torch.library.opcheck(ops._varlen_attn, (x.q, x.k, x.v, *arguments))
    out, lse, rng_state = ops._varlen_attn(x.q, x.k, x.v, *arguments)
    torch.library.opcheck(
        ops._varlen_attn_backward,
        (x.do, x.q, x.k, x.v, out, lse, *arguments, rng_state),
        test_utils=["test_schema", "test_faketensor"],
    )


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (384, 0), (1025, 1025)], ids=str)
def test_result_does_not_depend_on_the_other_sequences(window):
    """Batch invariance gives the same bits alone, beside a longer sequence, and in another
    order."""
    # 512 queries or fewer may be decoded, in parts by the batch.
    alone = varlen((600,), window=window, heads=2, heads_kv=2)
    x = make_inputs(both := varlen((600, 1024), window=window, heads=2, heads_kv=2))
    y = make_inputs(swapped := varlen((1024, 600), window=window, heads=2, heads_kv=2))
    z = make_inputs(alone)
    for name in ("q", "k", "v"):
        first, second = getattr(x, name).split(both.seqlens_q)
        setattr(y, name, torch.cat((second, first)))
        setattr(z, name, first.clone())
    expected = attend(alone, z)
    assert torch.equal(attend(both, x)[:600], expected)
    assert torch.equal(attend(swapped, y)[1024:], expected)


def test_lengths_may_be_promised_longer_than_they_are():
    """max_q and max_k of a padded batch are an upper bound of the lengths, as training frameworks
    pass it."""
    problem = varlen((300, 65), window=(-1, 0))
    x = make_inputs(problem)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    out = varlen_attn(*leaves, x.cu_seqlens_q, x.cu_seqlens_k, 4096, 4096, window_size=(-1, 0))
    gradients = torch.autograd.grad(out, leaves, x.do)
    assert_matches_reference(problem, x, Result(out.detach(), None, *gradients), check_lse=False)


def test_runs_ours():
    problem = varlen(SEQLENS)
    inputs = make_inputs(problem)
    assert "ours" in providers_of(lambda: attend(problem, inputs))
