"""Attention to a padded cache whose heads lie outside its rows."""

from __future__ import annotations

import pytest
import torch
from clients.test_workloads import padding, pair, tokens
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

from fa4_ext.integrations.transformers import attention, heads
from fa4_ext.integrations.transformers.compact import CompactMask, dense_mask

BATCH, ROWS, HEAD_DIM = 3, 20, 16
RUNS = torch.tensor([[0, 17], [5, 17], [16, 17]], dtype=torch.int32)


def mask_of(q_length: int, **bounds: int) -> CompactMask:
    """Makes a mask in whose rows the last 3 keys are not in use yet."""
    visible = torch.arange(ROWS) >= RUNS[:, :1]
    return CompactMask(
        (BATCH, 1, q_length, ROWS), anchor=torch.empty(0, dtype=torch.bool), used=17, runs=RUNS,
        visible_keys=visible & (torch.arange(ROWS) < 17), **bounds,
    )  # fmt: skip


@pytest.mark.parametrize("q_length", (1, 3))
@pytest.mark.parametrize("bounds", ({"right": 0}, {"right": 0, "left": 4}), ids=str)
@pytest.mark.parametrize("kv_heads", (2, 4))
def test_a_head_is_a_sequence_of_its_own(kv_heads, bounds, q_length):
    torch.manual_seed(0)
    query = torch.randn(BATCH, 4, q_length, HEAD_DIM)
    key, value = (torch.randn(BATCH, kv_heads, ROWS, HEAD_DIM) for _ in range(2))
    mask = mask_of(q_length, **bounds)
    window = mask.left, mask.right
    out = heads.attend_by_head(query, key, value, mask, causal=True, window_size=window)
    seen = dense_mask(mask)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, enable_gqa=True
    )
    rows = seen.any(-1)  # others are queries of padding
    ours, theirs = out.transpose(1, 2), expected.where(rows[..., None], 0.0)
    torch.testing.assert_close(ours.where(rows[..., None], 0.0), theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def caches(monkeypatch) -> list[bool]:
    """Notes of each call by head whether the keys are the cache's own memory."""
    found = []
    original = attention.attend_by_head

    def noting(query, key, value, mask, **options):
        def varlen(q, k, v, *arguments, **more):
            found.append((k.data_ptr(), v.data_ptr()) == (key.data_ptr(), value.data_ptr()))
            return original_varlen(q, k, v, *arguments, **more)

        original_varlen = heads.flash_attn_varlen_func
        monkeypatch.setattr(heads, "flash_attn_varlen_func", varlen)
        try:
            return original(query, key, value, mask, **options)
        finally:
            monkeypatch.setattr(heads, "flash_attn_varlen_func", original_varlen)

    monkeypatch.setattr(attention, "attend_by_head", noting)
    return found


@torch.no_grad()
@pytest.mark.parametrize("cache", ("dynamic", "static"))
def test_generation_padded_on_the_left_copies_no_cache(cache, caches):
    expected, actual = pair(AutoModelForCausalLM, LlamaConfig())
    options = dict(
        input_ids=tokens(), attention_mask=padding("left"), max_new_tokens=5, do_sample=False,
        cache_implementation=cache, disable_compile=True, eos_token_id=None,
    )  # fmt: skip
    wanted, got = (model.generate(**options) for model in (expected, actual))
    assert torch.equal(got, wanted)
    layers = actual.config.num_hidden_layers
    assert len(caches) >= 4 * layers and all(caches), caches


@torch.no_grad()
def test_a_static_cache_that_no_kernel_reads_in_place_is_not_copied(caches, monkeypatch):
    monkeypatch.setattr(attention, "reads_in_place", lambda *tensors: False)
    expected, actual = pair(AutoModelForCausalLM, LlamaConfig())
    options = dict(
        input_ids=tokens(), max_new_tokens=5, do_sample=False, cache_implementation="static",
        disable_compile=True, eos_token_id=None,
    )  # fmt: skip
    wanted, got = (model.generate(**options) for model in (expected, actual))
    assert torch.equal(got, wanted)
    layers = actual.config.num_hidden_layers
    assert len(caches) == 4 * layers and all(caches), caches


@torch.no_grad()
def test_sinks_of_single_heads_need_all_heads_in_one_call(caches):
    expected, actual = pair(AutoModelForCausalLM, GptOssConfig())
    options = dict(
        input_ids=tokens(), attention_mask=padding("left"), max_new_tokens=3, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    wanted, got = (model.generate(**options) for model in (expected, actual))
    assert torch.equal(got, wanted) and not caches
