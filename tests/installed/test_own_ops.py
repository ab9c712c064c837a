"""Checks this library's own ops beside this torch: schemas, where they are implemented, and what
fake CUDA tensors give."""

from __future__ import annotations

import pytest
import torch
from processes import python
from torch._subclasses.fake_tensor import FakeTensorMode

import fa4_ext
from fa4_ext import flash_attn

FORWARD = (
    "Tensor q, Tensor k, Tensor v{sink}, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? seqused_k, Tensor? block_table, "
    "float? softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right, "
    "int num_splits, bool deterministic) -> (Tensor out, Tensor softmax_lse)"
)
SCHEMAS = {
    "attention": FORWARD.format(sink=""),
    "attention_with_sink": FORWARD.format(sink=", Tensor learnable_sink"),
    "attention_backward": "Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float? softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    schema = str(getattr(torch.ops.fa4_ext, name).default._schema)
    assert schema.replace("SymInt", "int") == f"fa4_ext::{name}({SCHEMAS[name]}".replace(
        "SymInt", "int"
    )


@pytest.mark.parametrize("head_dim_v", (64, 128))
@pytest.mark.parametrize("with_sink", (False, True), ids=("plain", "sink"))
def test_fake_cuda_tensors_have_results_and_gradients(with_sink, head_dim_v):
    with FakeTensorMode():
        q, k = (
            torch.empty(2, rows, heads, 64, dtype=torch.bfloat16, device="cuda")
            for rows, heads in ((100, 8), (300, 2))
        )
        v = torch.empty(2, 300, 2, head_dim_v, dtype=torch.bfloat16, device="cuda")
        sink = torch.empty(8, device="cuda") if with_sink else None
        out, lse = flash_attn.flash_attn_func(
            q, k, v, causal=True, learnable_sink=sink, return_lse=True
        )
        assert (out.shape, out.dtype) == ((2, 100, 8, head_dim_v), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((2, 8, 100), torch.float32)
        # autograd itself would need a device
        lengths = None, None, 100, 300
        gradients = torch.ops.fa4_ext.attention_backward(
            out, q, k, v, out, lse, *lengths, None, True, -1, -1, False
        )
        assert [one.shape for one in gradients] == [one.shape for one in (q, k, v)]


ON_THE_CPU = """
import torch
from fa4_ext.flash_attn import flash_attn_func

q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
try:
    flash_attn_func(q, q, q)
except NotImplementedError as error:
    print(str(error).splitlines()[0])
"""


def test_tensors_of_the_cpu_are_an_error_of_the_dispatcher():
    """It runs in a process of its own, as tests here implement the op for the CPU."""
    printed = python("-c", ON_THE_CPU).stdout
    assert printed.startswith("Could not run 'fa4_ext::attention'"), printed
    assert "'CPU' backend" in printed, printed


def test_nothing_is_registered_by_a_call():
    with fa4_ext.register() as handle:
        pass
    assert not handle.active
    with FakeTensorMode():
        q = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
        flash_attn.flash_attn_func(q, q, q)
    assert not handle.active
