"""Checks the functions of fa4_ext.flash_attn without a GPU: math_ops.py computes the op in fp64, so
that what the functions make of their arguments is held to plain math."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import pathlib
import subprocess
import sys

import math_ops
import pytest
import torch
from torch.autograd import forward_ad

import fa4_ext
from fa4_ext import flash_attn
from fa4_ext.flash_attn import _cache, _logsumexp, flash_attn_func, flash_attn_varlen_func
from fa4_ext.flash_attn import flash_attn_with_kvcache as with_cache
from fa4_ext.flash_attn._ops import add_sink

LENGTHS = (5, 1, 0, 7)
HEADS, HEADS_KV, HEAD_DIM = 4, 2, 16
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left": {"window_size": (3, None)},
    "causal_window": {"causal": True, "window_size": (2, -1)},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def qkv(rows: int = 5, keys: int = 7, batch: int = 2, head_dim_v: int = 24, **options) -> list:
    return [
        torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True, **options)
        for shape in (
            (rows, HEADS, HEAD_DIM),
            (keys, HEADS_KV, HEAD_DIM),
            (keys, HEADS_KV, head_dim_v),
        )
    ]


def expected(q, k, v, sink=None, causal=False, window_size=(-1, -1), scale=None) -> torch.Tensor:
    """Computes attention in an independent way: a softmax over scores and, maybe, a sink."""
    left, right = (10**9 if bound in (None, -1) else bound for bound in window_size)
    rows, keys = q.shape[1], k.shape[1]
    position = torch.arange(rows)[:, None] + keys - rows
    key = torch.arange(keys)
    seen = (key >= position - left) & (key <= position + (0 if causal else right))
    k, v = (tensor.repeat_interleave(HEADS // HEADS_KV, 2) for tensor in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or HEAD_DIM**-0.5)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink is not None:
        column = sink[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., :keys]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def gradients(out: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=out.dtype)))


def assert_same(ours, theirs, name: str = "out") -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("with_sink", (False, True), ids=("plain", "sink"))
def test_dense(mask, with_sink):
    inputs = qkv()
    if with_sink:
        inputs.append(torch.randn(HEADS, dtype=torch.float64, requires_grad=True))
    sink = {"learnable_sink": inputs[3]} if with_sink else {}
    out = flash_attn_func(*inputs[:3], **sink, **MASKS[mask])
    right = expected(*inputs, **MASKS[mask])
    assert_same(out, right)
    for name, ours, theirs in zip(
        ("dq", "dk", "dv", "dsink"),
        gradients(out, *inputs),
        gradients(right, *inputs),
        strict=False,
    ):
        assert_same(ours, theirs, name)


def packed(lengths_q=LENGTHS, lengths_k=None, spare: int = 0) -> tuple[list, list]:
    """Makes packed q, k and v with `spare` rows of NaN behind the sequences, and the
    cu_seqlens of both."""
    lengths = lengths_q, lengths_k or lengths_q
    starts = [torch.tensor([0, *itertools.accumulate(one)], dtype=torch.int32) for one in lengths]
    tensors = []
    for side, heads, head_dim in ((0, HEADS, HEAD_DIM), (1, HEADS_KV, HEAD_DIM), (1, HEADS_KV, 24)):
        tensor = torch.randn(sum(lengths[side]) + spare, heads, head_dim, dtype=torch.float64)
        tensor[sum(lengths[side]) :] = torch.nan
        tensors.append(tensor.requires_grad_())
    return tensors, starts


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("keys", (None, (7, 3, 2, 7)), ids=("self", "cross"))
@pytest.mark.parametrize("with_sink", (False, True), ids=("plain", "sink"))
def test_packed_sequences_are_dense_ones_by_themselves(mask, keys, with_sink):
    """Rows behind the last sequence are NaN, as is what the op leaves in their place."""
    (q, k, v), starts = packed(LENGTHS, keys, spare=3)
    sink = torch.randn(HEADS, dtype=torch.float64, requires_grad=True) if with_sink else None
    options = MASKS[mask] | ({"learnable_sink": sink} if with_sink else {})
    out = flash_attn_varlen_func(q, k, v, *starts, max(LENGTHS), max(keys or LENGTHS), **options)
    inputs = [q, k, v] + ([sink] if with_sink else [])
    rows, right = sum(LENGTHS), []
    for i in range(len(LENGTHS)):
        parts = [
            tensor[starts[side][i] : starts[side][i + 1]][None]
            for tensor, side in ((q, 0), (k, 1), (v, 1))
        ]
        right.append(expected(*parts, sink, **MASKS[mask])[0])
    theirs = torch.cat(right)
    assert_same(out[:rows], theirs)
    grad = torch.randn_like(out)
    grad[rows:] = torch.nan
    ours = torch.autograd.grad(out, inputs, grad)
    for name, one, other in zip(
        ("dq", "dk", "dv", "dsink"),
        ours,
        torch.autograd.grad(theirs, inputs, grad[:rows]),
        strict=False,
    ):
        assert_same(one, other.nan_to_num(0.0), name)


def test_the_logsumexp_holds_the_sink():
    q, k, v = qkv()
    sink = torch.randn(HEADS, dtype=torch.float64)
    _, plain = flash_attn_func(q, k, v, return_lse=True)
    _, with_sink = flash_attn_func(q, k, v, learnable_sink=sink, return_attn_probs=True)
    assert_same(with_sink, torch.logaddexp(plain, sink[:, None].float()), "lse")


def calls_with_logsumexp() -> dict:
    """Returns differentiable calls of q, k and v, and of a sink, that give the output and the
    logsumexp."""
    starts = torch.tensor([0, 4, 10], dtype=torch.int32)

    def of_packed(q, k, v):
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
        return flash_attn_varlen_func(q, k, v, starts, starts, 6, 6, return_lse=True)

    return {
        "dense": lambda *inputs: flash_attn_func(*inputs, return_lse=True),
        "sink": lambda *inputs: flash_attn_func(
            *inputs[:3], learnable_sink=inputs[3], return_lse=True
        ),
        "packed": of_packed,
    }


def logsumexp(q, k, sink=None) -> torch.Tensor:
    """Computes that of all keys, and of a sink, in an independent way."""
    k = k.repeat_interleave(HEADS // HEADS_KV, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
    if sink is not None:
        scores = torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:-1], 1)], -1)
    return scores.logsumexp(-1).float()


@pytest.mark.parametrize("beside", (False, True), ids=("alone", "beside the output's"))
@pytest.mark.parametrize("name", calls_with_logsumexp())
def test_the_logsumexp_has_a_gradient(name, beside):
    sink = torch.zeros(HEADS, dtype=torch.float64, requires_grad=True)
    inputs = [*qkv(rows=5, keys=5, head_dim_v=HEAD_DIM), *([sink] if name == "sink" else [])]
    out, lse = calls_with_logsumexp()[name](*inputs)
    q, k, v, *sinks = inputs
    if name == "packed":
        (q, k, v), lengths = (tensor.flatten(0, 1)[None] for tensor in (q, k, v)), (4, 6)
        parts = list(zip(*(tensor.split(lengths, 1) for tensor in (q, k, v)), strict=True))
        right = torch.cat([expected(*part) for part in parts], 1)[0]
        right_lse = torch.cat([logsumexp(*part[:2]) for part in parts], -1)[0]
    else:
        right, right_lse = expected(q, k, v, *sinks), logsumexp(q, k, *sinks)
    factor, factor_lse = torch.randn_like(right), torch.randn_like(right_lse)
    losses = [
        (one_lse * factor_lse).sum() + (one * factor).sum() * beside
        for one, one_lse in ((out, lse), (right, right_lse))
    ]
    ours, theirs = (
        torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        for loss in losses
    )
    for argument, one, other in zip("qkvs", ours, theirs, strict=False):
        assert_same(one, other, argument)


@pytest.mark.parametrize("head_dim_v", (HEAD_DIM, 24))
@pytest.mark.parametrize(
    "masks",
    [({}, {}), ({"window_size": (-1, 3)}, {"causal": True})],
    ids=("full", "causal"),
)
def test_parts_of_the_keys_are_merged_by_their_logsumexps(masks, head_dim_v):
    """As in a ring of devices. Under the causal mask the first three queries see no key of the
    second part."""
    q, k, v = qkv(rows=6, keys=6, head_dim_v=head_dim_v)
    parts = [
        flash_attn_func(q, k[:, keys], v[:, keys], return_lse=True, **mask)
        for keys, mask in zip((slice(3), slice(3, 6)), masks, strict=True)
    ]
    outs, lses = (torch.stack(results) for results in zip(*parts, strict=True))
    out = (lses.softmax(0).transpose(-1, -2).unsqueeze(-1) * outs).sum(0)
    right = expected(q, k, v, causal="causal" in masks[1])
    assert_same(out, right)
    for argument, ours, theirs in zip(
        "qkv", gradients(out, q, k, v), gradients(right, q, k, v), strict=True
    ):
        assert_same(ours, theirs, argument)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_a_gradient_of_the_logsumexp_is_not_rounded(dtype):
    out, lse = torch.randn(2, 7, 3, 16, dtype=dtype), torch.randn(2, 3, 7)
    given = torch.randn_like(lse)
    columns = _logsumexp._columns(given, lse, out)
    torch.testing.assert_close(-columns.double().sum(-1).mT, given.double(), rtol=0, atol=1e-6)


def test_a_gradient_of_the_logsumexp_of_a_wide_head_is_refused_and_not_dropped():
    q, k, v = (torch.randn(1, 3, HEADS, 256, requires_grad=True) for _ in range(3))
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    with pytest.raises(NotImplementedError, match="head dims of at most 248, here 256 and 256"):
        torch.autograd.grad(lse.sum(), (q, k, v), retain_graph=True)
    assert all(tensor is not None for tensor in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("name", calls_with_logsumexp())
def test_a_compiled_function_returns_the_logsumexp(name):
    sink = [torch.zeros(HEADS, dtype=torch.float64)] * (name == "sink")
    inputs = qkv(keys=5)
    call = calls_with_logsumexp()[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    (out, lse), (right, lse_right) = compiled(*inputs, *sink), call(*inputs, *sink)
    assert_same(lse, lse_right, "lse")
    ours, theirs = (
        gradients(one.sum() + each.sin().sum(), *inputs)
        for one, each in ((out, lse), (right, lse_right))
    )
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("place", range(4), ids=("q", "k", "v", "sink"))
@pytest.mark.parametrize("grad", (False, True), ids=("alone", "with grad"))
def test_forward_mode_differentiation_is_refused(place, grad):
    inputs = [tensor.detach() for tensor in qkv()] + [torch.zeros(HEADS)]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        one = inputs[place].requires_grad_(grad)
        inputs[place] = forward_ad.make_dual(one, torch.ones_like(one))
        flash_attn_func(*inputs[:3], learnable_sink=inputs[3])


def test_forward_mode_differentiation_of_a_cache_and_of_a_backward_is_refused():
    q, k, v = (tensor.detach() for tensor in qkv())
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: with_cache(q, k, v), (q,), (q,))
    q.requires_grad_()
    out = flash_attn_func(q, k, v)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        torch.autograd.grad(out, q, grad)


def test_a_level_of_forward_mode_without_tangents_changes_nothing():
    q, k, v = qkv()
    with forward_ad.dual_level():
        out = flash_attn_func(q, k, v)
    assert_same(out, flash_attn_func(q, k, v))


def test_a_row_that_sees_no_key_is_zero_with_any_sink():
    q, k, v = (tensor.detach() for tensor in qkv(rows=7, keys=5))
    for sink in (0.0, -torch.inf, -1e30):
        out, lse = flash_attn_func(
            q, k, v, causal=True, learnable_sink=torch.full((HEADS,), sink), return_lse=True
        )
        assert not out[:, :2].any() and out.isfinite().all(), sink
        assert not lse.isnan().any(), sink


@pytest.mark.parametrize("lse", (torch.inf, -torch.inf), ids=("PyTorch's", "ours"))
@pytest.mark.parametrize("sink", (0.5, -torch.inf))
def test_a_row_without_keys_stays_zero_whichever_kernel_ran(lse, sink):
    out, with_sink = add_sink(
        torch.zeros(1, 1, 1, 8), torch.full((1, 1, 1), lse), torch.full((1,), sink)
    )
    assert not out.any() and not out.isnan().any(), out
    assert with_sink.isfinite().all(), with_sink


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("strides", ("rows outside", "heads outside"))
def test_cache(mask, strides):
    """Rows beyond those in use are NaN."""
    used = (5, 30, 17)
    q, _, _ = qkv(rows=3, batch=3)
    caches = []
    for head_dim in (HEAD_DIM, 24):
        cache = torch.randn(3, HEADS_KV, 32, head_dim, dtype=torch.float64).transpose(1, 2)
        cache = cache.contiguous() if strides == "rows outside" else cache
        for i, length in enumerate(used):
            cache[i, length:] = torch.nan
        caches.append(cache)
    q = q.detach()
    out = with_cache(q, *caches, cache_seqlens=torch.tensor(used), **MASKS[mask])
    for i, length in enumerate(used):
        one = (tensor[i : i + 1] for tensor in (q, *(cache[:, :length] for cache in caches)))
        assert_same(out[i : i + 1], expected(*one, **MASKS[mask]), f"sequence {i}")


def test_a_cache_that_no_kernel_reads_in_place_is_packed(monkeypatch):
    q, k, v = (tensor.detach() for tensor in qkv(rows=3, keys=32, batch=3))
    k, v = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (k, v))
    options = {"cache_seqlens": torch.tensor([5, 30, 17]), "causal": True, "return_lse": True}
    in_place = with_cache(q, k, v, **options)
    monkeypatch.setattr(_cache, "reads_in_place", lambda *tensors: False)
    for name, ours, theirs in zip(
        ("out", "lse"), with_cache(q, k, v, **options), in_place, strict=True
    ):
        assert_same(ours, theirs, name)


@pytest.mark.parametrize("lengths", (torch.tensor([4, 9]), 6), ids=("tensor", "number"))
def test_new_keys_go_behind_those_in_use(lengths):
    q, new_k, new_v = (tensor.detach() for tensor in qkv(rows=3, keys=3))
    _, k, v = (tensor.detach() for tensor in qkv(keys=16))
    expected_k, expected_v = k.clone(), v.clone()
    used = [lengths] * 2 if isinstance(lengths, int) else lengths.tolist()
    for i, length in enumerate(used):
        expected_k[i, length : length + 3] = new_k[i]
        expected_v[i, length : length + 3] = new_v[i]
    out = with_cache(q, k, v, new_k, new_v, cache_seqlens=lengths, causal=True)
    assert torch.equal(k, expected_k) and torch.equal(v, expected_v)
    for i, length in enumerate(used):
        right = expected(
            q[i : i + 1], k[i : i + 1, : length + 3], v[i : i + 1, : length + 3], causal=True
        )
        assert_same(out[i : i + 1], right, f"sequence {i}")


def test_pages():
    """New keys begin in one page and end in the next."""
    page, table = 4, torch.tensor([[5, 0, 2], [3, 1, 4]], dtype=torch.int32)
    _, k, v = (tensor.detach() for tensor in qkv(keys=page, batch=6))
    q, new_k, new_v = (tensor.detach() for tensor in qkv(rows=2, keys=2))
    lengths = torch.tensor([3, 7], dtype=torch.int32)
    out = with_cache(q, k, v, new_k, new_v, cache_seqlens=lengths, page_table=table, causal=True)
    for i, length in enumerate(lengths.tolist()):
        rows = [cache[table[i].long()].flatten(0, 1) for cache in (k, v)]
        for cache, new in zip(rows, (new_k, new_v), strict=True):
            assert torch.equal(cache[length : length + 2], new[i])
        one = (tensor[None, : length + 2] for tensor in rows)
        assert_same(out[i : i + 1], expected(q[i : i + 1], *one, causal=True), f"sequence {i}")
    by_varlen = flash_attn_varlen_func(
        q.flatten(0, 1), k, v, torch.tensor([0, 2, 4], dtype=torch.int32), None, 2, 12,
        seqused_k=lengths + 2, block_table=table, causal=True,
    )  # fmt: skip
    assert_same(by_varlen, out.flatten(0, 1))


def functions() -> dict:
    """Returns calls of every function, by name, which take further arguments."""
    (q, k, v), starts = packed()
    return {
        "flash_attn_func": lambda **more: flash_attn_func(*qkv(), **more),
        "flash_attn_varlen_func": lambda **more: flash_attn_varlen_func(
            q, k, v, *starts, 7, 7, **more
        ),
        "flash_attn_with_kvcache": lambda **more: with_cache(*(t.detach() for t in qkv()), **more),
    }


@pytest.mark.parametrize("name", flash_attn.__all__)
@pytest.mark.parametrize(
    ("argument", "value", "error", "words"),
    [
        ("softcap", 30.0, NotImplementedError, r"softcap is not supported .* must be 0.0, is 30.0"),
        ("alibi_slopes", torch.ones(4), NotImplementedError, "alibi_slopes .* None, is Tensor"),
        ("qv", torch.ones(4), NotImplementedError, "qv is not supported"),
        ("attention_chunk", 8, NotImplementedError, "attention_chunk .* None or 0, is 8"),
        ("sm_margin", 4, NotImplementedError, "sm_margin .* is 4"),
        ("window_size", (1, 2, 3), ValueError, r"two numbers, left and right, is \(1, 2, 3\)"),
        ("window_size", None, ValueError, "two numbers, left and right, is None"),
        ("num_splits", None, ValueError, "num_splits must be a number, .* is None"),
        ("block_sparse_tensors_bwd", (), NotImplementedError, "block_sparse_tensors_bwd .* is"),
        ("gather_bwd_recompute_p", True, NotImplementedError, "gather_bwd_recompute_p .* is True"),
        ("window_size", (-2, 0), ValueError, r"from 0 on, is \(-2, 0\)"),
        ("learnable_sink", torch.ones(3), ValueError, r"shape \(4,\), .*, has \(3,\)"),
        ("casual", True, TypeError, "unexpected keyword argument 'casual'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, argument, value, error, words):
    with pytest.raises(error, match=words):
        functions()[name](**{argument: value})


@pytest.mark.parametrize("name", flash_attn.__all__)
def test_arguments_that_ask_for_nothing_are_taken(name):
    functions()[name](
        softcap=0, alibi_slopes=None, qv=None, attention_chunk=0, pack_gqa=True, sm_margin=0,
        min_seqlen_k=3, disable_scheduler_metadata=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", flash_attn.__all__[:2])
def test_every_argument_of_flash_attn_4_is_taken_at_its_default(name):
    theirs = flash_attn_4_defaults(name)
    ours = inspect.signature(getattr(flash_attn, name)).parameters
    functions()[name](**{one: value for one, value in theirs.items() if one not in ours})


def flash_attn_4_defaults(function: str) -> dict:
    """Returns the defaults of a function of flash-attn 4, whose import takes seconds."""
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn 4 is not installed")
    package = importlib.util.find_spec("flash_attn.cute")
    source = pathlib.Path(package.origin).with_name("interface.py").read_text()
    found = next(node for node in ast.parse(source).body if getattr(node, "name", None) == function)
    names = [one.arg for one in found.args.args][-len(found.args.defaults) :]
    return {
        name: ast.literal_eval(value)
        for name, value in zip(names, found.args.defaults, strict=True)
    }


@pytest.mark.parametrize("name", flash_attn.__all__[:2])
def test_dropout_is_refused(name):
    with pytest.raises(NotImplementedError, match=r"dropout_p .* must be 0\.0, is 0\.1"):
        functions()[name](dropout_p=0.1)
    functions()[name](dropout_p=0.0)


def test_arguments_behind_the_tensors_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        flash_attn_func(*qkv(), 0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda q, k, v: {"k": k}, "k and v must be given together"),
        (lambda q, k, v: {"k": k, "v": v}, "cache_seqlens must be given with new keys"),
        (lambda q, k, v: {"block_table": torch.ones(2, 1)}, "cache_seqlens must be given"),
        (lambda q, k, v: {"cache_seqlens": torch.ones(3)}, r"shape \(2,\), .*, has \(3,\)"),
        (lambda q, k, v: {"cache_seqlens": -1}, "cache_seqlens must not be negative, is -1"),
        (
            lambda q, k, v: {"k": k[:, :2], "v": v[:, :1], "cache_seqlens": 1},
            r"v must have the shape \(2, 2, 2, 24\), .*; has \(2, 1, 2, 24\)",
        ),
        (
            lambda q, k, v: {"k": k[:1], "v": v[:1], "cache_seqlens": 1},
            r"k must have the shape \(2, 7, 2, 16\), .*; has \(1, 7, 2, 16\)",
        ),
        (
            lambda q, k, v: {"k": k[:, :, :1], "v": v[:, :, :1], "cache_seqlens": 1},
            r"k must have the shape \(2, 7, 2, 16\), .*; has \(2, 7, 1, 16\)",
        ),
    ],
)
def test_arguments_of_a_cache_that_do_not_fit_together(arguments, words):
    tensors = [tensor.detach() for tensor in qkv()]
    with pytest.raises(ValueError, match=words):
        with_cache(*tensors, **arguments(*tensors))


def test_one_name_of_the_table_alone():
    tensors = [tensor.detach() for tensor in qkv()]
    table = torch.ones(2, 1)
    with pytest.raises(TypeError, match="block_table and page_table are two names"):
        with_cache(*tensors, cache_seqlens=3, block_table=table, page_table=table)


def test_a_cache_has_no_backward_and_says_so():
    q, k, v = qkv()
    used = torch.tensor([3, 4])
    cache = [tensor.detach() for tensor in (k, v)]
    for tensors, name in (((q, *cache), "q"), ((q.detach(), k, cache[1]), "k_cache")):
        with pytest.raises(NotImplementedError, match=f"no backward, and {name} requires grad"):
            with_cache(*tensors, cache_seqlens=used)
    with pytest.raises(NotImplementedError, match="no backward, and k requires grad"):
        with_cache(q.detach(), *cache, k[:, :1], v[:, :1].detach(), cache_seqlens=used)
    assert not cache[0].requires_grad, "nothing has been written"
    with torch.no_grad():
        with_cache(q, k, v, cache_seqlens=used)


def test_keys_in_use_have_no_backward_and_say_so():
    (q, k, v), starts = packed()
    used = torch.tensor(LENGTHS, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="seqused_k has no backward: call it under"):
        flash_attn_varlen_func(q, k, v, *starts, 7, 7, seqused_k=used)


def test_lengths_may_be_left_out_or_lie_in_tensors():
    (q, k, v), starts = packed()
    given = flash_attn_varlen_func(q, k, v, *starts, 7, 7, causal=True)
    for lengths in ((), (None, None), (torch.tensor(7), torch.tensor(9))):
        assert_same(flash_attn_varlen_func(q, k, v, *starts, *lengths, causal=True), given)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("with_sink", (False, True), ids=("plain", "sink"))
def test_compiled_without_a_graph_break(with_sink, dynamic):
    q, k, v = qkv()
    sink = torch.randn(HEADS, dtype=torch.float64) if with_sink else None

    def call(q, k, v):
        return flash_attn_func(q, k, v, causal=True, learnable_sink=sink) * 2

    out = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)(q, k, v)
    assert_same(out, call(q, k, v))
    for ours, theirs in zip(
        gradients(out, q, k, v), gradients(call(q, k, v), q, k, v), strict=True
    ):
        assert_same(ours, theirs)


def test_a_step_of_decoding_compiled_without_a_graph_break():
    q, new_k, new_v = (tensor.detach() for tensor in qkv(rows=1, keys=1))
    _, k, v = (tensor.detach() for tensor in qkv(keys=16))
    used = torch.tensor([4, 9], dtype=torch.int32)

    def step(k, v):
        return with_cache(q, k, v, new_k, new_v, cache_seqlens=used, causal=True)

    caches = [[tensor.clone() for tensor in (k, v)] for _ in range(2)]
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(*caches[0])
    assert_same(out, step(*caches[1]))
    for ours, theirs in zip(*caches, strict=True):
        assert torch.equal(ours, theirs)


def test_the_ops_keep_torch_s_promises():
    """Schema, fake tensors, autograd and AOTDispatch, for unequal head dims and any order of
    dimensions."""
    q, k, v = (tensor.detach().transpose(1, 2).contiguous().transpose(1, 2) for tensor in qkv())
    options = (None, None, 5, 7, None, None, None, True, -1, -1, 0, False)
    inputs, ops = [q, k, v, torch.randn(HEADS)], torch.ops.fa4_ext
    for needs_grad in (False, True):
        q, k, v, sink = (tensor.requires_grad_(needs_grad) for tensor in inputs)
        for op, tensors in (
            (ops.attention.default, (q, k, v)),
            (ops.attention_with_sink.default, (q, k, v, sink)),
        ):
            torch.library.opcheck(op, (*tensors, *options))


class _Hopper:
    major, minor, multi_processor_count = 9, 0, 132


class _Ampere:
    major, minor, multi_processor_count = 8, 0, 108


class _Blackwell:
    major, minor, multi_processor_count = 10, 0, 148


@pytest.mark.parametrize(
    ("properties", "heads", "most"),
    [
        (_Hopper, (8, 8), 512),
        (_Hopper, (32, 2), 256),
        (_Hopper, (8, 3), 0),
        (_Blackwell, (8, 8), 512),
        (_Ampere, (8, 8), 0),
    ],
)
def test_how_many_queries_read_a_cache_in_place(monkeypatch, properties, heads, most):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda")
    sizes = torch.bfloat16, *heads, 128, 128
    assert _cache._most_queries(device, *sizes) == most
    with fa4_ext.register(disable=("*_decode_*",)):
        assert _cache._most_queries(device, *sizes) == 0, "decode kernels are disabled"
    assert _cache._most_queries(device, *sizes) == most


@pytest.mark.parametrize("dynamic", (None, True), ids=("some symbols", "all symbols"))
def test_whether_a_cache_is_read_in_place_is_a_constant_of_a_compiled_program(monkeypatch, dynamic):
    """A cache of heads outside rows is read where it lies, one of odd strides is not. After the
    first call the compiler has symbols for the sizes that changed."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Hopper)

    def compiled(q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        return q + 1 if _cache.reads_in_place(_OnCuda(q), cache, cache) else q - 1

    run = torch.compile(compiled, fullgraph=True, backend="eager", dynamic=dynamic)
    for batch, rows, head_dim, in_place in (
        (2, 1, 128, True),
        (3, 2, 128, True),
        (4, 300, 128, True),
        (4, 513, 128, False),
        (2, 1, 132, False),
    ):
        q, cache = torch.zeros(batch, rows, 8, head_dim), torch.zeros(batch, 8, 64, head_dim)
        sign = 1 if in_place else -1
        assert torch.equal(run(q, cache.transpose(1, 2)), q + sign), (batch, rows, head_dim)


class _OnCuda:
    """Says of a tensor that it is on a GPU."""

    def __init__(self, tensor: torch.Tensor):
        self.shape, self.dtype, self.device = tensor.shape, torch.bfloat16, torch.device("cuda")


def test_importing_the_package_does_not_import_the_functions():
    script = "import sys, fa4_ext; print([name for name in sys.modules if 'flash_attn' in name])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_second_derivative_is_an_error():
    q, k, v = qkv()
    (dq,) = torch.autograd.grad(flash_attn_func(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        dq.sum().backward()


def test_the_op_ran():
    math_ops.calls.clear()
    q, k, v = qkv()
    flash_attn_func(q, k, v).sum().backward()
    assert math_ops.calls == ["attention", "attention_backward"]
