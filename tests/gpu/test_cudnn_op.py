"""The cuDNN ops on our kernels: right numbers for every call that F.scaled_dot_product_attention
takes there, results as cuDNN's, and cuDNN wherever the user has chosen it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from calls import aten, cudnn_backward, cudnn_forward, run_autograd, run_cudnn_op
from cases import BLACKWELL, DTYPES, HEADS, UNEQUAL_HEAD_DIMS, dense, make_inputs
from compare import assert_matches_reference
from graphs import capture
from profiling import providers_of
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa4_ext

CAUSAL = {"is_causal": True, "top_left": True}
# Queries and keys: the same, fewer, more, many more than twice as many, in and around tiles.
LENGTHS = (
    (239, 239), (1, 700), (64, 65), (129, 1024), (700, 701), (203, 64), (1024, 129), (65, 64),
    (1500, 40), (128, 2),
)  # fmt: skip


def heads_first(x, *, requires_grad: bool = False):
    return [t.detach().transpose(1, 2).requires_grad_(requires_grad) for t in (x.q, x.k, x.v)]


@pytest.mark.usefixtures("strict")
class TestNumbers:
    @pytest.mark.parametrize("heads", HEADS)
    @pytest.mark.parametrize("lengths", LENGTHS, ids=str)
    @pytest.mark.parametrize("head_dim", (64, 128, 256))
    def test_causal_masks_aligned_top_left(self, head_dim, lengths, heads):
        heads, heads_kv = HEADS[heads]
        problem = dense(*lengths, head_dim=head_dim, heads=heads, heads_kv=heads_kv, **CAUSAL)
        inputs = make_inputs(problem)
        assert_matches_reference(problem, inputs, run_cudnn_op(problem, inputs, backward=True))

    @pytest.mark.parametrize("mask", ({}, CAUSAL), ids=("full", "causal"))
    @pytest.mark.parametrize("head_dims", UNEQUAL_HEAD_DIMS, ids=str)
    def test_unequal_head_dims(self, head_dims, mask):
        head_dim, head_dim_v = head_dims
        problem = dense(203, 300, head_dim=head_dim, head_dim_v=head_dim_v, heads_kv=2, **mask)
        inputs = make_inputs(problem)
        assert_matches_reference(problem, inputs, run_cudnn_op(problem, inputs, backward=True))

    @pytest.mark.parametrize("lengths", ((500, 500), (77, 500), (500, 77)), ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_plain_calls_and_autograd(self, dtype, lengths):
        problem = dense(*lengths, dtype=DTYPES[dtype], heads=8, heads_kv=2, **CAUSAL)
        inputs = make_inputs(problem)
        result = run_autograd(problem, inputs, backward=True, backend=None)
        assert_matches_reference(problem, inputs, result, check_lse=False)

    def test_keys_that_no_query_sees_may_be_nan(self):
        problem = dense(100, 333, **CAUSAL)
        inputs = make_inputs(problem)
        expected = run_cudnn_op(problem, inputs, backward=True)
        inputs.k[:, 100:], inputs.v[:, 100:] = float("nan"), float("nan")
        result = run_cudnn_op(problem, inputs, backward=True)
        assert torch.equal(result.out, expected.out) and torch.equal(result.lse, expected.lse)
        assert not result.dk[:, 100:].any() and not result.dv[:, 100:].any()
        assert torch.isfinite(result.dq).all()

    @pytest.mark.parametrize("lengths", ((300, 300), (77, 300), (300, 77)), ids=str)
    def test_deterministic_backward_gives_the_same_bits(self, lengths):
        problem = dense(*lengths, heads_kv=2, **CAUSAL)
        inputs = make_inputs(problem)
        torch.use_deterministic_algorithms(True)
        first, second = (run_cudnn_op(problem, inputs, backward=True) for _ in range(2))
        for name in ("dq", "dk", "dv"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert_matches_reference(problem, inputs, first)


def described(value) -> tuple | int | None:
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, value.device, value.shape, value.stride()


LAYOUTS = {
    "sequence first": lambda t: t.transpose(1, 2),
    "heads first": lambda t: t.transpose(1, 2).contiguous(),
}


@pytest.mark.parametrize("head_dims", ((128, 128), (128, 64)), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_described_as_cudnns(layout, head_dims):
    problem = dense(129, 203, head_dim=head_dims[0], head_dim_v=head_dims[1])
    inputs = make_inputs(problem)
    q, k, v = (LAYOUTS[layout](t) for t in (inputs.q, inputs.k, inputs.v))
    do = LAYOUTS[layout](inputs.do)

    def call():
        results = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = results
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False
        )
        return [described(value) for value in (*results, *gradients)]

    cudnns = call()
    with fa4_ext.register(fallback="error", speed_rules=False):
        assert call() == cudnns


def test_each_result_has_memory_of_its_own():
    problem = dense(129, 203)
    inputs = make_inputs(problem)
    with fa4_ext.register(fallback="error", speed_rules=False):
        results = [t for t in cudnn_forward(problem, inputs) if isinstance(t, torch.Tensor)]
    memories = {t.untyped_storage().data_ptr() for t in results}
    assert len(memories) == len(results), [t.shape for t in results]


QKV = (2, 8, 512, 128)


def qkv(*, keys: int = 512, head_dim: int = 128, head_dim_v: int = 128, dtype=torch.bfloat16):
    shapes = (2, 8, 512, head_dim), (2, 8, keys, head_dim), (2, 8, keys, head_dim_v)
    return [torch.randn(s, dtype=dtype, device="cuda", requires_grad=True) for s in shapes]


def both(tensors, **options):
    """Returns a forward and its backward as one piece of work."""

    def work():
        out = F.scaled_dot_product_attention(*tensors, **options)
        torch.autograd.grad(out.sum(), tensors)

    return work


@pytest.mark.usefixtures("lenient")
class TestWhoRuns:
    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ({}, {}),
            ({}, {"is_causal": True}),
            ({"keys": 700}, {"is_causal": True}),
            ({"keys": 300}, {"is_causal": True}),
            pytest.param(
                {"head_dim": 192},
                {},
                marks=pytest.mark.skipif(BLACKWELL, reason="goes to flash attention there"),
            ),
            ({"head_dim": 96, "head_dim_v": 64}, {}),
        ],
        ids=str,
    )
    def test_plain_calls_run_ours(self, shape, options):
        assert providers_of(both(qkv(**shape), **options)) <= {"ours", "other"}
        assert "ours" in providers_of(both(qkv(**shape), **options))

    @pytest.mark.parametrize("masked", (False, True), ids=("", "attn_mask"))
    def test_what_we_do_not_cover_runs_what_it_ran_without_us(self, masked):
        mask = torch.randn(512, 512, device="cuda").bfloat16() if masked else None
        with_us = providers_of(both(qkv(), dropout_p=0.1, attn_mask=mask))
        assert "ours" not in with_us and "cudnn" in with_us, with_us

    def test_choosing_cudnn_means_cudnn(self):
        tensors = qkv()
        choices = {
            "sdpa_kernel": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
            "set_priority": lambda: sdpa_kernel(
                [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                 SDPBackend.FLASH_ATTENTION], set_priority=True,
            ),
        }  # fmt: skip
        for name, choice in choices.items():
            with choice():
                assert "ours" not in providers_of(both(tensors)), name

    def test_flash_attention_switched_off_means_cudnn(self):
        torch.backends.cuda.enable_flash_sdp(False)
        try:
            assert "ours" not in providers_of(both(qkv()))
        finally:
            torch.backends.cuda.enable_flash_sdp(True)

    def test_the_backward_runs_where_its_forward_ran(self):
        tensors = qkv()

        def outside():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = F.scaled_dot_product_attention(*tensors)
            torch.autograd.grad(out.sum(), tensors)

        chosen = providers_of(outside)
        assert "cudnn" in chosen and "ours" not in chosen, chosen

        def inside():
            out = F.scaled_dot_product_attention(*tensors)
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                torch.autograd.grad(out.sum(), tensors)

        assert "cudnn" not in providers_of(inside)

    def test_prefer_false_leaves_cudnns_calls_to_cudnn(self):
        with fa4_ext.register(prefer=False):
            chosen = providers_of(both(qkv()))
        assert "cudnn" in chosen and "ours" not in chosen, chosen
        assert "ours" in providers_of(both(qkv()))


def test_either_half_may_be_cudnns():
    """cuDNN's backward reads our logsumexp as its own, and the other way round."""
    problem = dense(300, 300, heads=8, heads_kv=8, **CAUSAL)
    inputs = make_inputs(problem)
    with fa4_ext.register(fallback="error", speed_rules=False):
        ours = cudnn_forward(problem, inputs)
    cudnns = cudnn_forward(problem, inputs)
    torch.testing.assert_close(ours[1], cudnns[1], atol=2e-3, rtol=1e-3)
    stock = cudnn_backward(problem, inputs, cudnns)
    mixed = {"ours, cudnn": cudnn_backward(problem, inputs, ours)}
    with fa4_ext.register(fallback="error", speed_rules=False):
        # Its seed says that cuDNN ran the forward.
        mixed["cudnn, cudnn"] = cudnn_backward(problem, inputs, cudnns)
        seed = torch.zeros(3, dtype=torch.int64, device="cuda")[2]
        mixed["cudnn, ours"] = cudnn_backward(problem, inputs, (*cudnns[:6], seed, *cudnns[7:]))
    for (name, gradients), (i, gradient) in itertools.product(mixed.items(), enumerate("qkv")):
        error = (gradients[i] - stock[i]).float().norm() / stock[i].float().norm()
        assert error < 2e-2, f"{name}: d{gradient} differs by {error:.1e}"


@pytest.mark.usefixtures("strict")
class TestAround:
    @pytest.mark.parametrize("keys", (512, 700, 300))
    def test_compiled(self, keys):
        tensors = qkv(keys=keys)
        attend = torch.compile(F.scaled_dot_product_attention, fullgraph=True)

        def step(function):
            out = function(*tensors, is_causal=True)
            return out, *torch.autograd.grad(out.square().sum(), tensors)

        for eager, compiled in zip(step(F.scaled_dot_product_attention), step(attend), strict=True):
            torch.testing.assert_close(compiled, eager, atol=2e-2, rtol=2e-2)
        assert "cudnn" not in providers_of(lambda: step(attend))

    @pytest.mark.parametrize("keys", (512, 700, 300))
    def test_in_a_graph(self, keys):
        tensors = qkv(keys=keys)

        def step():
            out = F.scaled_dot_product_attention(*tensors, is_causal=True)
            return out, *torch.autograd.grad(out.sum(), tensors)

        graph, captured = capture(step)
        for tensor in tensors:
            tensor.data.normal_()
        graph.replay()
        for name, replayed, eager in zip(("out", "dq", "dk", "dv"), captured, step(), strict=True):
            torch.testing.assert_close(replayed, eager, atol=2e-2, rtol=2e-2, msg=name)

    def test_checkpointed(self):
        tensors = qkv(keys=300)

        def attend(*given):
            return F.scaled_dot_product_attention(*given, is_causal=True)

        kept = torch.autograd.grad(attend(*tensors).sum(), tensors)
        again = torch.utils.checkpoint.checkpoint(attend, *tensors, use_reentrant=False)
        for first, second in zip(kept, torch.autograd.grad(again.sum(), tensors), strict=True):
            torch.testing.assert_close(first, second, atol=2e-2, rtol=2e-2)
