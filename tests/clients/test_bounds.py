"""Packed sequences whose bounds the caller gives, as collators do for flash attention."""

from __future__ import annotations

import pytest
import torch
from clients.inputs import with_images
from clients.test_workloads import LAYERS, packed_positions, pair, tokens
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    ModernBertConfig,
    StaticCache,
)

from fa4_ext.integrations.transformers import attention as attention_module

ENDS = 5, 9, 12
# Bounds of queries and of keys of two rows with 12 and 15 tokens.
TWO_ROWS = torch.tensor([0, 5, 12, 16, 24]), torch.tensor([0, 7, 15, 19, 30])


def given(bounds: torch.Tensor, of_keys: torch.Tensor | None = None) -> dict:
    of_keys = bounds if of_keys is None else of_keys
    longest = [int(one.diff().max()) for one in (bounds, of_keys)]
    return dict(
        cu_seq_lens_q=bounds, cu_seq_lens_k=of_keys, max_length_q=longest[0],
        max_length_k=longest[1],
    )  # fmt: skip


def one_by_one(model, ids: torch.Tensor) -> torch.Tensor:
    """Returns a model's first result of each sequence by itself, side by side."""
    return torch.cat([model(one)[0] for one in ids.tensor_split(ENDS[:-1], 1)], 1)


def random_tensors(batch: int, q_length: int, kv_length: int) -> list[torch.Tensor]:
    return [torch.randn(batch, 4, length, 8) for length in (q_length, kv_length, kv_length)]


def layer(**attributes) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.fixture(params=("kernels", "elsewhere"))
def where(request, monkeypatch) -> str:
    """Says where attention runs: without dtypes no kernel covers a call."""
    if request.param == "elsewhere":
        monkeypatch.delitem(attention_module.DTYPES, "cpu")
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("use_cache", (False, True))
@pytest.mark.parametrize("config", (LlamaConfig, MistralConfig, Gemma3TextConfig, GptOssConfig))
def test_bounds_separate_sequences_in_every_layer(config, use_cache, where, calls):
    """With a cache the mask function does not look at the positions."""
    expected, actual = pair(AutoModelForCausalLM, config())
    ids, positions = tokens(batch=1), packed_positions()
    bounds = given(torch.tensor([0, *ENDS]))
    got = actual(ids, position_ids=positions, use_cache=use_cache, **bounds).logits
    torch.testing.assert_close(got, one_by_one(expected, ids), rtol=1e-4, atol=1e-5)
    assert getattr(calls, where) == LAYERS == calls.kernels + calls.elsewhere


@torch.no_grad()
@pytest.mark.parametrize("config", (BertConfig, ModernBertConfig))
def test_bounds_separate_sequences_of_encoders(config, where, calls):
    expected, actual = pair(AutoModel, config())
    ids, positions = tokens(batch=1), packed_positions()
    got = actual(ids, position_ids=positions, **given(torch.tensor([0, *ENDS])))[0]
    torch.testing.assert_close(got, one_by_one(expected, ids), rtol=1e-4, atol=1e-5)
    assert getattr(calls, where) == LAYERS == calls.kernels + calls.elsewhere


@torch.no_grad()
def test_bounds_count_while_a_static_cache_is_filled(where):
    expected, actual = pair(AutoModelForCausalLM, LlamaConfig())
    ids, positions = tokens(batch=1), packed_positions()
    cache = StaticCache(actual.config, max_cache_len=20)
    bounds = given(torch.tensor([0, *ENDS]))
    got = actual(ids, position_ids=positions, cache=cache, **bounds).logits
    torch.testing.assert_close(got, one_by_one(expected, ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_bounds_of_a_text_do_not_count_in_a_vision_tower(where):
    expected, actual = pair(AutoModelForImageTextToText, LlavaConfig())
    inputs = with_images(expected, 1)
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(length - 5)])[None]
    wanted = expected(**inputs, use_cache=False).logits
    bounds = given(torch.tensor([0, 5, length]))
    got = actual(**inputs, use_cache=False, **bounds).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", (False, True))
def test_bounds_of_queries_and_keys_may_differ(causal, where):
    """The mask of a sequence is aligned bottom-right."""
    query, key, value = random_tensors(2, 12, 15)
    module = layer(is_causal=causal)
    got = attention_module.attention(module, query, key, value, None, **given(*TWO_ROWS))[0]
    for row in range(2):
        for i in range(2):
            a, b = (TWO_ROWS[0][2 * row + i + j].item() - 12 * row for j in range(2))
            c, d = (TWO_ROWS[1][2 * row + i + j].item() - 15 * row for j in range(2))
            seen = torch.ones(b - a, d - c, dtype=torch.bool)
            seen = seen.tril(d - c - b + a) if causal else seen
            one = query[row, :, a:b], key[row, :, c:d], value[row, :, c:d], seen
            wanted = torch.nn.functional.scaled_dot_product_attention(*one).transpose(0, 1)
            torch.testing.assert_close(got[row, a:b], wanted, rtol=1e-4, atol=1e-5)


def test_a_sequence_across_rows_needs_the_kernels(monkeypatch):
    tensors = random_tensors(2, 12, 12)
    bounds = given(torch.tensor([0, 5, 24]))
    module = layer(is_causal=False)
    assert attention_module.attention(module, *tensors, None, **bounds)[0].isfinite().all()
    monkeypatch.delitem(attention_module.DTYPES, "cpu")
    with pytest.raises(NotImplementedError, match="continue in the next row"):
        attention_module.attention(module, *tensors, None, **bounds)


@pytest.mark.parametrize("inference", (False, True))
def test_bounds_that_change_in_place_are_read_again(inference):
    with torch.inference_mode(inference):
        tensors = random_tensors(1, 12, 12)
        cu_seqlens = torch.tensor([0, 5, 21])
        module = layer(is_causal=False)
        without = attention_module.attention(module, *tensors, None)[0]
        for bounds, counts in (([0, 5, 21], False), ([0, 5, 12], True), ([0, 5, 20], False)):
            cu_seqlens.copy_(torch.tensor(bounds))
            got = attention_module.attention(module, *tensors, None, **given(cu_seqlens))[0]
            assert torch.allclose(got, without, atol=1e-5) != counts, bounds


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("counts", (False, True))
def test_in_a_graph_bounds_count_as_outside(batch, counts, where):
    """Nothing is read in a graph, which is one for either kind of bounds."""
    torch._dynamo.reset()
    tensors = random_tensors(batch, 12, 12)
    ends = [5, 12, 14, 24][: 2 * batch]
    bounds = given(torch.tensor([0, *ends]) if counts else torch.tensor([0, *ends, 40]))
    module = layer(is_causal=False)

    def call(*inputs):
        return attention_module.attention(module, *inputs, None, **bounds)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors), rtol=1e-4, atol=1e-5)
