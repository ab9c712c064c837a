"""Checks fa4_ext.flash_attn on the GPU: results and gradients of the functions against fp32,
attention sinks, caches read in place, CUDA graphs and compiled programs. What the functions make of
their arguments is checked by tests/installed/test_flash_attn.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calls import TORCH_2_12, dense_cache, own_forward_of_cache, paged, run_own
from cases import (
    BLACKWELL,
    DEVICE,
    HEAD_DIMS,
    HEADS,
    MASKS,
    UNEQUAL_HEAD_DIMS,
    Problem,
    dense,
    make_inputs,
    varlen,
)
from compare import assert_close, assert_matches_reference
from fresh_process import run_script
from profiling import kernels_of
from reference import Padding, Result, hidden

from fa4_ext.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

strict = pytest.mark.usefixtures("strict")


def options_of(problem: Problem) -> dict:
    return {
        "causal": problem.is_causal,
        "window_size": problem.window,
        "softmax_scale": problem.scale,
    }


def call(problem: Problem, inputs, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls the function for the problem's layout, and returns out and lse."""
    q, k, v = inputs.q, inputs.k, inputs.v
    more = options_of(problem) | {"return_lse": True} | more
    if not problem.varlen:
        return flash_attn_func(q, k, v, **more)
    lengths = inputs.cu_seqlens_q, inputs.cu_seqlens_k, problem.max_q, problem.max_k
    return flash_attn_varlen_func(q, k, v, *lengths, **more)


def differentiable(inputs):
    return replace(
        inputs,
        **{name: getattr(inputs, name).detach().requires_grad_() for name in ("q", "k", "v")},
    )


PROBLEMS = {
    "dense": dense(200, 333),
    "short": dense(3, 333),
    "varlen": varlen((129, 1, 64, 0, 300), (129, 7, 64, 5, 200)),
}


@strict
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_and_backward(name, heads, mask, head_dim):
    fields = dict(zip(("heads", "heads_kv"), HEADS[heads], strict=True))
    problem = replace(PROBLEMS[name], head_dim=head_dim, **fields, **MASKS[mask])
    inputs = differentiable(make_inputs(problem))
    out, lse = call(problem, inputs)
    gradients = torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.do)
    assert_matches_reference(problem, inputs, Result(out.detach(), lse, *gradients))


@strict
@pytest.mark.parametrize("head_dims", UNEQUAL_HEAD_DIMS, ids=str)
def test_unequal_head_dims(head_dims):
    if BLACKWELL and head_dims not in ((192, 128), (128, 64)):
        pytest.skip("Blackwell's kernels have fewer pairs")
    problem = dense(200, 333, head_dim=head_dims[0], head_dim_v=head_dims[1], is_causal=True)
    inputs = make_inputs(problem)
    assert_matches_reference(problem, inputs, run_own(problem, inputs, backward=True))


WITHOUT_REGISTRATION = """
    import fa4_ext
    from calls import own_backward, own_forward, run_own
    from cases import dense, make_inputs
    from compare import assert_matches_reference
    from profiling import providers_of

    assert fa4_ext.default_handle is None
    problem = dense(2048, 2048, is_causal=True)
    inputs = make_inputs(problem)
    ran = providers_of(lambda: own_backward(problem, inputs, own_forward(problem, inputs)))
    assert ran == {"ours"}, ran
    assert_matches_reference(problem, inputs, run_own(problem, inputs, backward=True))
"""


def test_our_kernels_run_without_a_registration():
    run_script(WITHOUT_REGISTRATION, FA4_EXT_AUTOREGISTER="0")


@strict
@pytest.mark.parametrize("problem", (dense(700, 700), varlen((300, 200))), ids=("dense", "varlen"))
def test_a_deterministic_backward(problem):
    """The argument asks for it, without torch's setting."""
    problem = replace(problem, heads_kv=2)
    inputs = make_inputs(problem)
    first, *others = (run_own(problem, inputs, backward=True, deterministic=True) for _ in range(3))
    for other in others:
        for name in ("dq", "dk", "dv"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name
    assert_matches_reference(problem, inputs, first)


def math_with_sink(problem: Problem, inputs, sink, dtype) -> tuple[torch.Tensor, ...]:
    """Computes a softmax with one more column, in `dtype`: out and the gradients of q, k, v and the
    sink."""
    q, k, v = (
        tensor.detach().to(dtype).requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v)
    )
    sink = sink.detach().to(dtype).requires_grad_()
    rows = [Padding(lengths, DEVICE) for lengths in (problem.seqlens_q, problem.seqlens_k)]
    padded = [
        side.pad(tensor) if problem.varlen else tensor
        for side, tensor in zip((rows[0], rows[1], rows[1]), (q, k, v), strict=True)
    ]
    mask = hidden(problem.seqlens_q, problem.seqlens_k, problem.bounds, DEVICE)
    heads_first = [tensor.transpose(1, 2) for tensor in padded]
    ratio = problem.heads // problem.heads_kv
    queries, keys, values = (
        heads_first[0],
        *(tensor.repeat_interleave(ratio, 1) for tensor in heads_first[1:]),
    )
    scores = queries @ (keys * problem.softmax_scale).transpose(-1, -2)
    column = sink[None, :, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores.masked_fill(mask, -torch.inf), column], -1).softmax(-1)
    out = (weights[..., :-1] @ values).transpose(1, 2)
    out = rows[0].pack(out) if problem.varlen else out
    return out.detach(), *torch.autograd.grad(out, (q, k, v, sink), inputs.do.to(dtype))


@strict
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_attention_sinks(name, mask):
    """Rows behind the last packed sequence are NaN: they must not reach the sink's gradient."""
    problem = replace(PROBLEMS[name], heads=8, heads_kv=2, head_dim=64, **MASKS[mask])
    inputs = differentiable(make_inputs(problem))
    sink = torch.randn(problem.heads, device=DEVICE, dtype=problem.dtype, requires_grad=True)
    given = inputs
    if problem.varlen:
        spare = inputs.q.new_full((5, *inputs.q.shape[1:]), float("nan"))
        given = replace(
            inputs,
            q=torch.cat([inputs.q, spare]),
            do=torch.cat([inputs.do, spare]),
        )
    out, _ = call(problem, given, learnable_sink=sink)
    wanted = inputs.q, inputs.k, inputs.v, sink
    ours = out[: len(inputs.q)].detach(), *torch.autograd.grad(out, wanted, given.do)
    truth, plain = (
        math_with_sink(problem, inputs, sink, dtype) for dtype in (torch.float32, problem.dtype)
    )
    *most, dsink = zip(("out", "dq", "dk", "dv", "dsink"), ours, plain, truth, strict=True)
    for result in most:
        assert_close(*result, floor=1e-4)
    # The largest of eight errors of plain math is often small by chance: two roundings more.
    assert_close(*dsink, floor=torch.finfo(problem.dtype).eps * truth[-1].abs().max().item())


def attend(q, k, v, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes plain math: the output and the logsumexp."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).float() * scale
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp().to(v.dtype) @ v
    return out.transpose(1, 2), lse


@strict
@pytest.mark.parametrize("head_dim", (64, 128))
def test_parts_of_the_keys_are_merged_by_their_logsumexps(head_dim):
    problem = dense(200, 333, heads=4, heads_kv=4, head_dim=head_dim)
    inputs = make_inputs(problem)

    def ours(q, k, v):
        return flash_attn_func(q, k, v, softmax_scale=problem.softmax_scale, return_lse=True)

    def plain(q, k, v):
        return attend(q, k, v, problem.softmax_scale)

    def results(attention, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (
            tensor.detach().to(dtype).requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v)
        )
        parts = [attention(q, k[:, keys], v[:, keys]) for keys in (slice(100), slice(100, None))]
        outs, lses = (torch.stack(of_parts) for of_parts in zip(*parts, strict=True))
        out = (lses.softmax(0).transpose(-1, -2).unsqueeze(-1) * outs).sum(0)
        return [out, *torch.autograd.grad(out, (q, k, v), inputs.do.to(out.dtype))]

    of_ours, of_plain = (results(one, problem.dtype) for one in (ours, plain))
    names, truth = ("out", "dq", "dk", "dv"), results(plain, torch.float32)
    for name, *found in zip(names, of_ours, of_plain, truth, strict=True):
        assert_close(name, *found, floor=1e-3)


CACHES = {
    "one query": varlen((1, 1, 1), (1000, 0, 77)),
    "some": varlen((5, 5), (700, 9), is_causal=True),
    "many": varlen((130, 130), (700, 140), is_causal=True),
    "window": varlen((3, 3), (700, 200), window=(100, 0)),
}


@strict
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", CACHES)
def test_a_dense_cache_is_read_in_place(name, head_dim):
    problem = replace(CACHES[name], heads=8, heads_kv=2, head_dim=head_dim)
    inputs = make_inputs(problem)
    assert_matches_reference(problem, inputs, own_forward_of_cache(problem, inputs, 1024))
    k, v = dense_cache(problem, inputs, 1024)
    q = inputs.q.unflatten(0, (problem.batch, -1))
    used = torch.tensor(problem.seqlens_k, dtype=torch.int32, device=DEVICE)
    names = kernels_of(
        lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=used, **options_of(problem))
    )
    assert len(names) == 1 and "decode" in names[0], names


def test_more_queries_than_a_kernel_decodes_read_a_copy():
    problem = replace(varlen((600, 600), (700, 640), is_causal=True), heads=8, heads_kv=2)
    inputs = make_inputs(problem)
    k, v = dense_cache(problem, inputs, 1024)
    used = torch.tensor(problem.seqlens_k, dtype=torch.int32, device=DEVICE)
    q = inputs.q.unflatten(0, (problem.batch, -1))
    out, lse = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=used, return_lse=True, **options_of(problem)
    )
    result = Result(out.flatten(0, 1), lse.transpose(0, 1).flatten(1))
    assert_matches_reference(problem, inputs, result)


@strict
@pytest.mark.skipif(not TORCH_2_12, reason="torch takes a block_table since 2.12")
def test_pages():
    problem = varlen((2, 2), (700, 130), heads=8, heads_kv=2, is_causal=True)
    inputs = make_inputs(problem)
    k, v, table = paged(problem, inputs, 256)
    used = torch.tensor(problem.seqlens_k, dtype=torch.int32, device=DEVICE)
    out, lse = flash_attn_with_kvcache(
        inputs.q.unflatten(0, (2, 2)), k, v, cache_seqlens=used, block_table=table, causal=True,
        return_lse=True,
    )  # fmt: skip
    result = Result(out.flatten(0, 1), lse.transpose(0, 1).flatten(1))
    assert_matches_reference(problem, inputs, result)


def test_steps_of_decoding_in_a_cuda_graph():
    """The graph writes a key into the cache and reads as many as are in use when it runs."""
    problem = varlen((1, 1), (100, 37), heads=8, heads_kv=2)
    inputs = make_inputs(problem)
    k, v = (torch.nan_to_num(cache) for cache in dense_cache(problem, inputs, 256))
    used = torch.tensor(problem.seqlens_k, dtype=torch.int32, device=DEVICE)
    q = inputs.q.unflatten(0, (2, 1))
    new = [torch.randn(2, 1, 2, 128, device=DEVICE, dtype=q.dtype) for _ in range(2)]

    def step():
        return flash_attn_with_kvcache(q, k, v, *new, cache_seqlens=used, causal=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ((100, 37), (101, 38), (255, 3)):
        used.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, step()), lengths


@pytest.mark.parametrize("with_sink", (False, True), ids=("plain", "sink"))
def test_compiled(with_sink):
    problem = dense(200, 200, heads=8, heads_kv=2, is_causal=True)
    inputs = differentiable(make_inputs(problem))
    sink = torch.randn(8, device=DEVICE, requires_grad=True) if with_sink else None

    def attention(q, k, v):
        return flash_attn_func(q, k, v, causal=True, learnable_sink=sink)

    tensors = inputs.q, inputs.k, inputs.v
    eager = attention(*tensors)
    compiled = torch.compile(attention, fullgraph=True)(*tensors)
    assert torch.equal(eager, compiled)
    wanted = (*tensors, sink) if with_sink else tensors
    for ours, theirs in zip(
        torch.autograd.grad(compiled, wanted, inputs.do),
        torch.autograd.grad(eager, wanted, inputs.do),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
