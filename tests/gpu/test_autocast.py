"""fp32 tensors under autocast: attention runs in the lower precision on our kernels, gradients come
back in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, DTYPES, dense, make_inputs, varlen
from compare import assert_matches_reference
from reference import Result
from test_nested import jagged
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.usefixtures("strict")


def check(problem, inputs, leaves, out) -> None:
    """Checks `out` of the fp32 `leaves`, in the layout of `inputs`, whose values fp32 holds
    exactly."""
    assert out.dtype == problem.dtype
    gradients = torch.autograd.grad(out, leaves, inputs.do)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    ours = Result(out.detach(), None, *(gradient.to(problem.dtype) for gradient in gradients))
    assert_matches_reference(problem, inputs, ours, check_lse=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense(dtype):
    problem = dense(301, 301, dtype=DTYPES[dtype], is_causal=True)
    inputs = make_inputs(problem)
    leaves = [t.float().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    with torch.autocast(DEVICE, problem.dtype), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), is_causal=True)
    check(problem, inputs, leaves, out.transpose(1, 2))


def test_jagged():
    problem = varlen((301, 65))
    inputs = make_inputs(problem)
    leaves = [t.float().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    nested = (jagged(t, inputs.cu_seqlens_q, problem.seqlens_q) for t in leaves)
    with torch.autocast(DEVICE, problem.dtype), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*nested)
    check(problem, inputs, leaves, out.transpose(1, 2).values())
