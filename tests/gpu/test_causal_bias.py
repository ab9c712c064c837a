"""torch.nn.attention.bias: the lower-right causal mask calls our op with unequal lengths, the
upper-left one never does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, HEADS, dense, make_inputs
from compare import assert_close, assert_matches_reference
from profiling import providers_of
from reference import Result
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left


def heads_first(inputs):
    return [t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v)]


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", (20, 64, 128))
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 300), (65, 129), (203, 799)])
def test_lower_right(seqlen_q, seqlen_k, head_dim, heads, dtype):
    """CausalBias pads head dim 20 itself."""
    fields = dict(
        head_dim=head_dim,
        heads=HEADS[heads][0],
        heads_kv=HEADS[heads][1],
        dtype=DTYPES[dtype],
        is_causal=True,
    )
    inputs = make_inputs(problem := dense(seqlen_q, seqlen_k, **fields))
    tensors = [t.requires_grad_() for t in heads_first(inputs)]
    out = F.scaled_dot_product_attention(
        *tensors, attn_mask=causal_lower_right(seqlen_q, seqlen_k), enable_gqa=heads != "mha"
    )
    gradients = torch.autograd.grad(out, tensors, inputs.do.transpose(1, 2))
    out, *gradients = (t.detach().transpose(1, 2) for t in (out, *gradients))
    assert_matches_reference(problem, inputs, Result(out, None, *gradients), check_lse=False)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(65, 129), (129, 65)])
def test_upper_left_of_unequal_lengths(seqlen_q, seqlen_k, strict):
    inputs = make_inputs(dense(seqlen_q, seqlen_k))
    q, k, v = heads_first(inputs)
    bias = causal_upper_left(seqlen_q, seqlen_k)
    assert {"ours"} == providers_of(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).tril()
    with sdpa_kernel(SDPBackend.MATH):
        truth = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
        plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_close("out", out, plain, truth)
