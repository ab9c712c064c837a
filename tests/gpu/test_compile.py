"""torch.compile and torch.export over our kernels. Inductor asserts the sizes and strides of what
ops return."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from cases import HEADS, dense, make_inputs, varlen
from compare import assert_close, assert_matches_reference
from profiling import providers_of
from reference import Result, compute
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.utils._triton import has_triton

pytestmark = pytest.mark.usefixtures("strict")


@pytest.fixture(params=("aot_eager", "inductor"))
def backend(request) -> str:
    """Returns a compiler, with nothing compiled before."""
    if request.param == "inductor" and not (
        (shutil.which("cc") or shutil.which("gcc")) and has_triton()
    ):
        pytest.skip("inductor needs Triton and a C compiler")
    torch._dynamo.reset()
    return request.param


def heads_first(inputs, *, requires_grad: bool = True):
    return (t.transpose(1, 2).requires_grad_(requires_grad) for t in (inputs.q, inputs.k, inputs.v))


def check_gradients(problem, inputs, out, tensors) -> None:
    """Compares `out` [batch, heads, seqlen, head_dim] of `tensors`, and its gradients, with
    fp32."""
    gradients = torch.autograd.grad(out, tensors, inputs.do.transpose(1, 2))
    out, *gradients = (t.detach().transpose(1, 2) for t in (out, *gradients))
    assert_matches_reference(problem, inputs, Result(out, None, *gradients), check_lse=False)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compile_without_graph_break(backend, dynamic):
    @torch.compile(fullgraph=True, backend=backend, dynamic=dynamic)
    def step(q, k, v):
        return F.scaled_dot_product_attention(q * 1.0, k, v, is_causal=True) + 0.0

    for seqlen in (256, 300, 512) if dynamic else (300,):
        problem = dense(seqlen, seqlen, is_causal=True)
        inputs = make_inputs(problem)
        tensors = tuple(heads_first(inputs))
        check_gradients(problem, inputs, step(*tensors), tensors)


@pytest.mark.parametrize("heads", HEADS)
def test_compiled_output_has_the_layout_of_the_eager_one(backend, heads):
    """Queries are [batch, heads, seqlen, head_dim] in memory, or users' transposed views."""
    compiled = torch.compile(F.scaled_dot_product_attention, fullgraph=True, backend=backend)
    inputs = make_inputs(dense(300, 300, heads=HEADS[heads][0], heads_kv=HEADS[heads][1]))
    for layout in (lambda t: t, lambda t: t.contiguous()):
        q, k, v = (layout(t) for t in heads_first(inputs, requires_grad=False))
        expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != "mha")
        out = compiled(q, k, v, enable_gqa=heads != "mha")
        assert (out.shape, out.stride(), out.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        )
        assert torch.equal(out, expected), (
            f"{int((out != expected).sum())} of {out.numel()} elements differ"
        )


def test_compiled_lower_right_bias(backend):
    compiled = torch.compile(F.scaled_dot_product_attention, fullgraph=True, backend=backend)
    problem = dense(129, 300, is_causal=True)
    inputs = make_inputs(problem)
    tensors = tuple(heads_first(inputs))
    check_gradients(problem, inputs, compiled(*tensors, causal_lower_right(129, 300)), tensors)


def test_compiled_varlen_attn(backend):
    compiled = torch.compile(varlen_attn, fullgraph=True, backend=backend)
    problem = varlen((300, 65, 129), window=(64, 0))
    inputs = make_inputs(problem)
    q, k, v = (t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    out = compiled(
        q, k, v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 300, 300, window_size=problem.window
    )
    gradients = torch.autograd.grad(out, (q, k, v), inputs.do)
    assert_matches_reference(
        problem, inputs, Result(out.detach(), None, *gradients), check_lse=False
    )


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("decomposed", (False, True), ids=("exported", "decomposed"))
def test_exported_program_runs_ours(decomposed):
    """The program has a symbolic sequence length; once it calls F.scaled_dot_product_attention,
    once the aten op that export chooses for it."""
    inputs = make_inputs(dense(300, 300, is_causal=True))
    seqlen = torch.export.Dim("seqlen", min=16, max=4096)
    tensors = tuple(heads_first(inputs, requires_grad=False))
    program = torch.export.export(Attention(), tensors, dynamic_shapes=({2: seqlen},) * 3)
    if decomposed:
        program = program.run_decompositions()
        targets = [str(node.target) for node in program.graph.nodes]
        ops = {f"aten._scaled_dot_product_{name}_attention.default" for name in ("cudnn", "flash")}
        assert ops & set(targets), targets
    module = program.module()
    for length in (300, 513):
        problem = dense(length, length, is_causal=True)
        inputs = make_inputs(problem)
        tensors = tuple(heads_first(inputs, requires_grad=False))
        assert "ours" in providers_of(lambda tensors=tensors: module(*tensors))
        truth, plain = (
            compute(problem, inputs, dtype, backward=False)
            for dtype in (torch.float32, problem.dtype)
        )
        assert_close("out", module(*tensors).transpose(1, 2), plain.out, truth.out)
