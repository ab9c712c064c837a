"""The memory-efficient op: what PyTorch takes to it, by the op itself and by
F.scaled_dot_product_attention."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from calls import efficient_backward, efficient_forward, run_efficient_op
from cases import BLACKWELL, DEVICE, DTYPES, Inputs, Problem, dense, make_inputs
from compare import assert_matches_reference
from profiling import providers_of
from reference import Result
from ways import deterministic, without_cudnn

import fa4_ext

pytestmark = pytest.mark.skipif(BLACKWELL, reason="only Hopper has kernels with a bias")

HEADS = {"heads": 4, "heads_kv": 4}
KINDS = ("normal", "documents", "rows_without_keys", "low_packed", "nothing")
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (72, 40))


def check_op(problem: Problem) -> None:
    inputs = make_inputs(problem)
    assert_matches_reference(problem, inputs, run_efficient_op(problem, inputs))


@pytest.mark.usefixtures("strict")
class TestOp:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
    def test_biases(self, head_dims, kind, dtype):
        head_dim, head_dim_v = head_dims
        check_op(
            dense(
                203, 331, head_dim=head_dim, head_dim_v=head_dim_v, bias=kind, dtype=DTYPES[dtype],
                **HEADS,
            )
        )  # fmt: skip

    @pytest.mark.parametrize("rows", (1, 31, 32, 33, 64, 1000))
    def test_rows_of_the_logsumexp(self, rows):
        """They are rounded up to 32. Those of one head do not reach the next head's."""
        check_op(dense(rows, 300, bias="normal", batch=3, **HEADS))

    @pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
    @pytest.mark.parametrize("situation", (nullcontext, deterministic))
    def test_without_a_bias(self, head_dims, situation):
        head_dim, head_dim_v = head_dims
        with situation():
            check_op(dense(203, 331, head_dim=head_dim, head_dim_v=head_dim_v, **HEADS))

    def test_strides_are_those_that_pytorch_promises(self):
        problem = dense(203, 336, bias="documents", **HEADS)
        inputs = make_inputs(problem)
        # PyTorch's own takes biases of all heads alone, with rows at multiples of 8 elements.
        inputs.bias = inputs.bias.expand(problem.batch, 4, 203, 336)
        ours = efficient_forward(problem, inputs)
        gradients = efficient_backward(problem, inputs, ours)
        with fa4_ext.register(prefer=False):
            stock = efficient_forward(problem, inputs)
            stock_gradients = efficient_backward(problem, inputs, stock)
        for one, other in zip((*ours[:2], *gradients), (*stock[:2], *stock_gradients), strict=True):
            assert one.shape == other.shape and one.stride() == other.stride()


def attend(
    problem: Problem, x: Inputs, mask: torch.Tensor | None, by=F.scaled_dot_product_attention
) -> Result:
    tensors = [t.detach().transpose(1, 2).requires_grad_() for t in (x.q, x.k, x.v)]
    out = by(*tensors, attn_mask=mask, scale=problem.scale, is_causal=problem.is_causal)
    gradients = torch.autograd.grad(out, tensors, x.do.transpose(1, 2))
    out, *gradients = (t.detach().transpose(1, 2) for t in (out, *gradients))
    return Result(out, None, *gradients)


@pytest.mark.usefixtures("strict")
class TestFunction:
    """Calls that PyTorch takes to this op run on our kernels, and are right."""

    @pytest.mark.parametrize("situation", (deterministic, without_cudnn))
    @pytest.mark.parametrize("boolean", (False, True), ids=("float", "bool"))
    @pytest.mark.parametrize("kind", ("causal", "padding_right", "documents", "rows_without_keys"))
    def test_masks(self, kind, boolean, situation):
        problem = dense(333, 333, bias=kind, **HEADS)
        x = make_inputs(problem)
        mask = x.bias == 0 if boolean else x.bias
        with situation():
            found = providers_of(lambda: attend(problem, x, mask))
            result = attend(problem, x, mask)
        assert found - {"other"} == {"ours"}, found
        assert_matches_reference(problem, x, result, check_lse=False)

    def test_rows_without_keys_are_as_pytorch_has_them(self):
        problem = dense(300, 300, bias="rows_without_keys", **HEADS)
        x = make_inputs(problem)
        with without_cudnn():
            ours = attend(problem, x, x.bias == 0)
            with fa4_ext.register(prefer=False):
                stock = attend(problem, x, x.bias == 0)
        empty = x.bias.isneginf().all(dim=-1).transpose(1, 2)
        for name in ("out", "dq"):
            one, other = (getattr(result, name)[empty] for result in (ours, stock))
            assert torch.equal(one, other), (name, one.abs().max(), other.abs().max())

    @pytest.mark.parametrize("lengths", ((300, 500), (500, 300)), ids=str)
    def test_top_left_causal_where_algorithms_are_deterministic(self, lengths):
        problem = dense(*lengths, is_causal=True, top_left=True, **HEADS)
        x = make_inputs(problem)
        with deterministic():
            found = providers_of(lambda: attend(problem, x, None))
            result = attend(problem, x, None)
        assert found - {"other"} == {"ours"}, found
        assert_matches_reference(problem, x, result, check_lse=False)

    @pytest.mark.parametrize("situation", (deterministic, without_cudnn))
    def test_compiled(self, situation):
        problem = dense(300, 333, bias="documents", **HEADS)
        x = make_inputs(problem)
        compiled = torch.compile(F.scaled_dot_product_attention, fullgraph=True)
        with situation():
            result = attend(problem, x, x.bias, by=compiled)
            found = providers_of(lambda: attend(problem, x, x.bias, by=compiled))
        assert found - {"other"} == {"ours"}, found
        assert_matches_reference(problem, x, result, check_lse=False)


@pytest.mark.usefixtures("lenient")
class TestMixed:
    """PyTorch computes the gradient of a mask, from our forward's results."""

    @pytest.mark.parametrize("compiled", (False, True))
    @pytest.mark.parametrize("kind", ("normal", "rows_without_keys"))
    @pytest.mark.parametrize("lengths", ((128, 256), (203, 331)), ids=str)
    def test_a_mask_that_requires_a_gradient(self, lengths, kind, compiled):
        problem = dense(*lengths, bias=kind, **HEADS)
        x = make_inputs(problem)
        call = F.scaled_dot_product_attention
        call = torch.compile(call) if compiled else call

        def gradients():
            tensors = [t.detach().transpose(1, 2).requires_grad_() for t in (x.q, x.k, x.v)]
            mask = x.bias.detach().requires_grad_()
            out = call(*tensors, attn_mask=mask)
            return torch.autograd.grad(out, [*tensors, mask], x.do.transpose(1, 2))

        found = providers_of(gradients)
        assert "ours" in found and len(found - {"other"}) > 1, found
        ours = gradients()
        with fa4_ext.register(prefer=False):
            stock = gradients()
        for name, one, other in zip(("q", "k", "v", "mask"), ours, stock, strict=True):
            assert one.isfinite().all(), name
            error = (one - other).float().norm() / other.float().norm()
            assert error < 1e-2, f"d{name}: {error:.1e}"

    def test_a_forward_of_pytorch_s_gets_its_backward(self):
        problem = dense(128, 256, bias="normal", **HEADS)
        x = make_inputs(problem)
        x.bias = x.bias.expand(problem.batch, 4, 128, 256)
        with fa4_ext.register(prefer=False):
            forward = efficient_forward(problem, x)
            expected = efficient_backward(problem, x, forward)
        for one, other in zip(efficient_backward(problem, x, forward), expected, strict=True):
            torch.testing.assert_close(one, other)

    def test_fp32(self):
        q = torch.randn(2, 4, 128, 64, device=DEVICE)
        mask = torch.rand(128, 128, device=DEVICE) < 0.7
        with fa4_ext.register(fallback="error"):
            out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        assert out.isfinite().all()
