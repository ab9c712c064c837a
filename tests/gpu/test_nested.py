"""Nested tensors, jagged and strided, through F.scaled_dot_product_attention, which gives them to
the op with cu_seqlens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, MASKS, make_inputs, varlen
from compare import assert_matches_reference
from profiling import providers_of
from reference import Result
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.usefixtures("strict")

SEQLENS = {"self": ((799, 65, 300), None), "cross": ((129, 300, 1), (461, 64, 203))}


def jagged(values: torch.Tensor, cu_seqlens: torch.Tensor, seqlens) -> torch.Tensor:
    """Returns [batch, heads, (seqlens), head_dim] of the packed [total, heads, head_dim]."""
    return torch.nested.nested_tensor_from_jagged(
        values, cu_seqlens.long(), max_seqlen=max(seqlens)
    ).transpose(1, 2)


def strided(values: torch.Tensor, seqlens) -> torch.Tensor:
    return torch.nested.as_nested_tensor(
        list(values.split(seqlens)), layout=torch.strided
    ).transpose(1, 2)


def problem_of(lengths: str, mask: str, **fields):
    if lengths == "cross" and mask == "causal":
        pytest.skip(
            "F.scaled_dot_product_attention aligns is_causal top-left, which means nothing for "
            "unequal lengths"
        )
    return varlen(*SEQLENS[lengths], **MASKS[mask], **fields)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ("full", "causal"))
@pytest.mark.parametrize("lengths", SEQLENS)
def test_jagged(lengths, mask, dtype):
    problem = problem_of(lengths, mask, dtype=DTYPES[dtype])
    inputs = make_inputs(problem)
    leaves = q, k, v = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]

    def attend():
        nested_q = jagged(q, inputs.cu_seqlens_q, problem.seqlens_q)
        nested_k, nested_v = (jagged(t, inputs.cu_seqlens_k, problem.seqlens_k) for t in (k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                nested_q, nested_k, nested_v, is_causal=problem.is_causal
            )

    out = attend().transpose(1, 2).values()
    gradients = torch.autograd.grad(out, leaves, inputs.do)
    assert_matches_reference(
        problem, inputs, Result(out.detach(), None, *gradients), check_lse=False
    )
    assert "ours" in providers_of(attend)


@pytest.mark.parametrize("lengths", SEQLENS)
def test_strided(lengths):
    problem = problem_of(lengths, "full")
    inputs = make_inputs(problem)
    leaves = q, k, v = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]

    def attend():
        nested = (
            strided(q, problem.seqlens_q),
            strided(k, problem.seqlens_k),
            strided(v, problem.seqlens_k),
        )
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*nested)

    out = torch.cat(attend().transpose(1, 2).unbind())
    gradients = torch.autograd.grad(out, leaves, inputs.do)
    assert_matches_reference(
        problem, inputs, Result(out.detach(), None, *gradients), check_lse=False
    )
    assert "ours" in providers_of(attend)
