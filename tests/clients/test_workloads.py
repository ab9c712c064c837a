"""Workloads that the kernels have to cover: every attention call of them is counted."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from clients import families
from torch._subclasses import FakeTensorMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BertConfig,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MoonshineConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    T5Config,
)
from transformers.masking_utils import create_causal_mask

from fa4_ext.integrations.transformers import attention as attention_module

BATCH, LENGTH, LAYERS = 3, 12, 2


def pair(auto: type, config: PreTrainedConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Returns small models with transformers' attention and with fa4_ext's, and equal weights."""
    return pair_of(auto, families.small(config))


def pair_of(auto: type, config: PreTrainedConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    models = []
    for name in ("eager" if isinstance(config, GptOssConfig) else "sdpa", "fa4_ext"):
        torch.manual_seed(0)
        models.append(auto.from_config(copy.deepcopy(config), attn_implementation=name).eval())
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


def llama() -> tuple[PreTrainedModel, PreTrainedModel]:
    return pair(AutoModelForCausalLM, LlamaConfig())


def tokens(length: int = LENGTH, batch: int = BATCH) -> torch.Tensor:
    return torch.randint(3, families.VOCABULARY // 2, (batch, length))


def padding(side: str) -> torch.Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    for row, count in ((0, 7), (2, 3)):
        if side in ("left", "both"):
            mask[row, : count // 2 + 1] = 0
        if side in ("right", "both"):
            mask[row, -count // 2 :] = 0
    return mask


def packed_positions() -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in (5, 4, 3)])[None]


WORKLOADS = {
    "llama": (AutoModelForCausalLM, LlamaConfig, {}),
    "llama, padded left": (AutoModelForCausalLM, LlamaConfig, {"attention_mask": "left"}),
    "llama, padded right": (AutoModelForCausalLM, LlamaConfig, {"attention_mask": "right"}),
    "llama, padded on both sides": (AutoModelForCausalLM, LlamaConfig, {"attention_mask": "both"}),
    "llama, packed": (AutoModelForCausalLM, LlamaConfig, {"position_ids": "packed"}),
    "mistral, window": (AutoModelForCausalLM, MistralConfig, {}),
    "mistral, window, padded left": (
        AutoModelForCausalLM, MistralConfig, {"attention_mask": "left"}
    ),
    "mistral, window, padded right": (
        AutoModelForCausalLM, MistralConfig, {"attention_mask": "right"}
    ),
    "mistral, window, packed": (AutoModelForCausalLM, MistralConfig, {"position_ids": "packed"}),
    "gemma3, both kinds of layers": (AutoModelForCausalLM, Gemma3TextConfig, {}),
    "gemma3, padded left": (AutoModelForCausalLM, Gemma3TextConfig, {"attention_mask": "left"}),
    "gpt-oss, sinks": (AutoModelForCausalLM, GptOssConfig, {}),
    "gpt-oss, sinks, padded left": (
        AutoModelForCausalLM, GptOssConfig, {"attention_mask": "left"}
    ),
    "ModernBERT": (AutoModel, ModernBertConfig, {}),
    "ModernBERT, padded right": (AutoModel, ModernBertConfig, {"attention_mask": "right"}),
    "sentence encoder": (AutoModel, BertConfig, {"attention_mask": "right"}),
    "sentence encoder, padded left": (AutoModel, BertConfig, {"attention_mask": "left"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_attention_call_runs_on_the_kernels(name, calls):
    auto, config, given = WORKLOADS[name]
    expected, actual = pair(auto, config())
    inputs = {"input_ids": tokens()}
    rows = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if "attention_mask" in given:
        inputs["attention_mask"] = padding(given["attention_mask"])
        rows = inputs["attention_mask"].bool()
    if "position_ids" in given:
        inputs["position_ids"] = packed_positions().expand(BATCH, -1)
    got, wanted = actual(**inputs)[0], expected(**inputs)[0]
    torch.testing.assert_close(got[rows], wanted[rows], rtol=1e-4, atol=1e-5)
    assert (calls.kernels, calls.elsewhere) == (LAYERS, 0)


def test_cross_attention_to_a_padded_encoder(calls):
    """As many queries as keys, too: the padding of the encoder is not that of the decoder."""
    expected, actual = pair(AutoModel, BartConfig())
    for length in (LENGTH, LENGTH - 3):
        calls.clear()
        inputs = dict(input_ids=tokens(), attention_mask=padding("right"))
        inputs["decoder_input_ids"] = tokens(length)
        got, wanted = actual(**inputs)[0], expected(**inputs)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert (calls.kernels, calls.elsewhere) == (3 * LAYERS, 0)


def test_chunks_without_padding(calls):
    config = families.small(Llama4TextConfig())
    config.attention_chunk_size = 5
    config.layer_types = ["chunked_attention", "full_attention"]
    expected, actual = pair_of(AutoModelForCausalLM, config)
    ids = tokens()
    torch.testing.assert_close(actual(ids)[0], expected(ids)[0], rtol=1e-4, atol=1e-5)
    assert (calls.kernels, calls.elsewhere) == (LAYERS, 0)


@torch.no_grad()
@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Gemma3TextConfig, GptOssConfig])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_generated_tokens_are_those_of_transformers(config, cache, side, calls):
    expected, actual = pair(AutoModelForCausalLM, config())
    options = dict(
        input_ids=tokens(), attention_mask=None if side == "none" else padding(side),
        max_new_tokens=6, do_sample=False, cache_implementation=cache, disable_compile=True,
        eos_token_id=None,
    )  # fmt: skip
    wanted = expected.generate(**options)
    calls.clear()
    assert torch.equal(actual.generate(**options), wanted)
    assert calls.elsewhere == 0 and calls.kernels >= 6 * LAYERS, f"{calls.kernels}, {calls}"


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_several_queries_on_a_cache(static, calls):
    """Speculative decoding and chunked prefill ask several tokens at once."""
    expected, actual = llama()
    ids = tokens()
    results = []
    for model in (expected, actual):
        cache = StaticCache(model.config, max_cache_len=20) if static else None
        first = model(ids[:, :5], cache=cache, use_cache=True)
        results.append(model(ids[:, 5:], cache=first.cache).logits)
    torch.testing.assert_close(*reversed(results), rtol=1e-4, atol=1e-5)
    assert (calls.kernels, calls.elsewhere) == (2 * LAYERS, 0)


def test_a_custom_mask_of_four_dimensions_goes_to_sdpa(calls):
    expected, actual = llama()
    ids = tokens()
    mask = torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.4
    mask |= torch.eye(LENGTH, dtype=torch.bool)
    for given in (mask, torch.where(mask, 0.0, torch.finfo(torch.float32).min)):
        calls.clear()
        got, wanted = (model(ids, attention_mask=given).logits for model in (actual, expected))
        torch.testing.assert_close(got, wanted)
        assert (calls.kernels, calls.elsewhere) == (0, LAYERS)


@pytest.mark.parametrize("kind", ["or", "and", "blocks"])
def test_what_a_model_adds_to_the_mask_goes_to_sdpa(kind, calls):
    """A prefix that is seen from everywhere, and blocks of an image that see each other."""
    expected, actual = llama()
    blocks = torch.full((BATCH, LENGTH), -1)
    blocks[:, 2:6] = 0
    extra = {
        "or": {"or_mask_function": lambda b, h, q, k: k < 4},
        "and": {"and_mask_function": lambda b, h, q, k: (q - k) % 2 == 0},
        "blocks": {"block_sequence_ids": blocks},
    }[kind]
    ids = tokens()
    results = []
    for model in (actual, expected):
        embeds = model.get_input_embeddings()(ids)
        mask = create_causal_mask(model.config, embeds, None, None, **extra)
        results.append(model(inputs_embeds=embeds, attention_mask=mask).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert (calls.kernels, calls.elsewhere) == (0, LAYERS)


def test_dropout_goes_to_sdpa_with_the_mask(calls):
    expected, actual = llama()
    for model in (expected, actual):
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train()
    inputs = dict(input_ids=tokens(), attention_mask=padding("left"))
    results = []
    for model in (actual, expected):
        torch.manual_seed(3)
        results.append(model(**inputs).logits[inputs["attention_mask"].bool()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert (calls.kernels, calls.elsewhere) == (0, LAYERS)


def test_a_position_bias_goes_to_sdpa(calls):
    expected, actual = pair(AutoModel, T5Config())
    inputs = dict(input_ids=tokens(), decoder_input_ids=tokens(8), attention_mask=padding("right"))
    torch.testing.assert_close(actual(**inputs)[0], expected(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert calls.kernels == 0 and calls.elsewhere == 3 * LAYERS


def test_head_dims_beyond_the_kernels_go_to_sdpa(calls, monkeypatch):
    monkeypatch.setattr(attention_module, "LARGEST_HEAD_DIM", 4)
    expected, actual = llama()
    inputs = dict(input_ids=tokens(), attention_mask=padding("left"))
    rows = inputs["attention_mask"].bool()
    got, wanted = (model(**inputs).logits[rows] for model in (actual, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (calls.kernels, calls.elsewhere) == (0, LAYERS)


@pytest.mark.parametrize(
    ("capability", "head_dims", "covered"),
    [
        ((9, 0), (64, 64), True),
        ((9, 0), (72, 72), True),
        ((8, 9), (64, 64), True),
        ((8, 9), (192, 128), False),
        ((12, 0), (192, 128), False),
        ((7, 5), (64, 64), False),
    ],
)
def test_head_dims_that_nothing_runs_on_a_device_go_to_sdpa(
    capability, head_dims, covered, monkeypatch
):
    """PyTorch's flash attention, which runs what no kernel covers, needs equal head dims."""
    device = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda of: device)
    asked = []
    monkeypatch.setattr(attention_module, "_sdpa", lambda *tensors, **others: asked.append(1))
    monkeypatch.setattr(attention_module, "_dense_call", lambda q, *others, **options: q)
    with FakeTensorMode():
        dims = *head_dims[:1], *head_dims
        tensors = [
            torch.empty(1, 4, LENGTH, dim, dtype=torch.float16, device="cuda") for dim in dims
        ]
        attention_module.attention(torch.nn.Module(), *tensors, None, is_causal=False)
    assert bool(asked) != covered


def test_other_devices_and_dtypes_go_to_sdpa(calls, monkeypatch):
    monkeypatch.delitem(attention_module.DTYPES, "cpu")
    expected, actual = llama()
    ids = tokens()
    torch.testing.assert_close(actual(ids).logits, expected(ids).logits)
    assert (calls.kernels, calls.elsewhere) == (0, LAYERS)


def test_float32_is_cast_under_autocast_as_sdpa_casts_it(calls, monkeypatch):
    monkeypatch.setitem(attention_module.DTYPES, "cpu", (torch.bfloat16,))
    expected, actual = llama()
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = actual(ids).logits, expected(ids).logits
    torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.02)
    assert (calls.kernels, calls.elsewhere) == (LAYERS, 0)


def test_float32_is_cast_in_a_quantised_model(calls, monkeypatch):
    """Its layer norms stay in float32."""
    monkeypatch.setitem(attention_module.DTYPES, "cpu", (torch.bfloat16,))
    module = torch.nn.Module()
    module.config = LlamaConfig(dtype="bfloat16")
    tensors = [torch.randn(BATCH, heads, LENGTH, 8) for heads in (4, 2, 2)]
    module.num_key_value_groups = 2
    assert attention_module.attention(module, *tensors, None)[0].dtype == torch.float32
    assert (calls.kernels, calls.elsewhere) == (0, 1)
    module.config._is_quantized = True
    assert attention_module.attention(module, *tensors, None)[0].dtype == torch.bfloat16
    assert (calls.kernels, calls.elsewhere) == (1, 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_stays_on_the_kernels(reentrant, calls):
    expected, actual = llama()
    inputs = dict(input_ids=tokens(), attention_mask=padding("left"))
    rows = inputs["attention_mask"].bool()
    for model in (expected, actual):
        model.train()
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        model.enable_input_require_grads()
        model(**inputs, use_cache=False).logits[rows].square().sum().backward()
    for (name, one), other in zip(actual.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert (calls.kernels, calls.elsewhere) == (2 * LAYERS, 0)


@torch.no_grad()
def test_a_layer_that_is_causal_only_without_a_mask(calls):
    """Moonshine's decoder says so itself: a mask that hides only the future would make it
    bidirectional."""
    config = MoonshineConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=2, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
        pad_head_dim_to_multiple_of=8, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    expected, actual = pair(AutoModelForSpeechSeq2Seq, config)
    sound = torch.randn(2, 2000)
    ids = torch.randint(3, 40, (2, 7))
    wanted, got = (
        model(input_values=sound, decoder_input_ids=ids).logits for model in (expected, actual)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    changed = torch.cat([ids[:, :-1], ids[:, -1:] % 37 + 3], 1)
    earlier = actual(input_values=sound, decoder_input_ids=changed).logits[:, :-1]
    torch.testing.assert_close(earlier, got[:, :-1], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_inference_mode(calls):
    expected, actual = llama()
    inputs = dict(input_ids=tokens(), attention_mask=padding("left"))
    rows = inputs["attention_mask"].bool()
    got, wanted = (model(**inputs).logits[rows] for model in (actual, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (calls.kernels, calls.elsewhere) == (LAYERS, 0)


def test_one_description_serves_all_layers(monkeypatch):
    """Left-padded rows are described once a forward, and not once a layer."""
    from fa4_ext.integrations.transformers import rows

    made = []
    original = rows._rows
    monkeypatch.setattr(rows, "_rows", lambda *given: made.append(1) or original(*given))
    llama()[1](tokens(), attention_mask=padding("left"))
    assert len(made) == 1


@torch.no_grad()
@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Llama4TextConfig])
@pytest.mark.parametrize("given", ["nothing", "padding", "packed", "bounds"])
def test_a_forward_of_fake_tensors_plans_without_values(config, given):
    """Programs estimate their memory so. Nothing can be read from such tensors."""
    expected, actual = pair(AutoModelForCausalLM, config())
    bounds = dict(cu_seq_lens_q=torch.tensor([0, 5, 12]), cu_seq_lens_k=torch.tensor([0, 5, 12]))
    inputs = {
        "nothing": {},
        "padding": {"attention_mask": padding("left")},
        "packed": {"position_ids": packed_positions().expand(BATCH, -1).contiguous()},
        "bounds": bounds,
    }[given]
    inputs["input_ids"] = tokens(batch=1 if given == "bounds" else BATCH)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(one) for name, one in inputs.items()}
        if given == "bounds":
            fake |= dict(max_length_q=7, max_length_k=7)
        shapes = [model(**fake, use_cache=False).logits.shape for model in (actual, expected)]
    assert shapes[0] == shapes[1]
