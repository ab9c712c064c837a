"""Models under torch.compile."""

from __future__ import annotations

import pytest
import torch
from clients import families
from clients.inputs import accepted
from clients.test_families import close
from clients.test_workloads import BATCH, LAYERS, LENGTH, packed_positions, padding, pair, tokens
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    StaticCache,
)
from transformers.masking_utils import create_masks_for_generate

from fa4_ext.integrations.transformers import register


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    register()


def inputs_with(given: str, **options) -> tuple[dict, torch.Tensor]:
    """Returns a model's inputs, and which of their rows are no padding."""
    inputs = {"input_ids": tokens(), **options}
    rows = torch.ones_like(inputs["input_ids"]).bool()
    if given == "padding":
        inputs["attention_mask"] = padding("left")
        rows = inputs["attention_mask"].bool()
    elif given == "packed":
        inputs["position_ids"] = packed_positions().expand(len(rows), -1)
    return inputs, rows


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (LlamaConfig, "nothing"),
        pytest.param(LlamaConfig, "padding", marks=pytest.mark.long),
        pytest.param(LlamaConfig, "packed", marks=pytest.mark.long),
        pytest.param(MistralConfig, "nothing", marks=pytest.mark.long),
        pytest.param(MistralConfig, "padding", marks=pytest.mark.long),
        pytest.param(MistralConfig, "packed", marks=pytest.mark.long),
    ],
)
def test_a_model_compiles_into_one_graph(config, given):
    register(masks_in_graphs=True)
    expected, actual = pair(AutoModelForCausalLM, config())
    inputs, rows = inputs_with(given)
    compiled = torch.compile(actual, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(**inputs).logits[rows], expected(**inputs).logits[rows]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    assert actual.lm_head.weight.grad.isfinite().all()


@pytest.mark.long
def test_a_compiled_model_that_passes_no_positions_on_runs_on_the_kernels(calls):
    register(masks_in_graphs=True)
    expected, actual = pair(AutoModelForCausalLM, BertConfig(is_decoder=True))
    ids = tokens()
    compiled = torch.compile(actual, fullgraph=True, backend="aot_eager")
    got, wanted = (model(ids, use_cache=False).logits for model in (compiled, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert calls.kernels == LAYERS


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "side"),
    [
        (LlamaConfig, "none"),
        pytest.param(LlamaConfig, "left", marks=pytest.mark.long),
        pytest.param(MistralConfig, "left", marks=pytest.mark.long),
        pytest.param(Gemma3TextConfig, "none", marks=pytest.mark.long),
        pytest.param(Gemma3TextConfig, "left", marks=pytest.mark.long),
        pytest.param(GptOssConfig, "left", marks=pytest.mark.long),
    ],
)
def test_decoding_with_a_static_cache_is_one_graph_on_the_kernels(config, side, calls):
    """As `generate` does it: the masks are made first, and the forward is compiled."""
    expected, actual = pair(AutoModelForCausalLM, config())
    options = dict(
        input_ids=tokens(), attention_mask=None if side == "none" else padding(side),
        max_new_tokens=7, do_sample=False, cache_implementation="static", disable_compile=True,
        eos_token_id=None,
    )  # fmt: skip
    wanted = expected.generate(**options)
    calls.clear()
    forward = actual.forward
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")

    def one_forward(*inputs, **named):
        # `generate` does not compile the prefill.
        return (compiled if named["input_ids"].shape[1] == 1 else forward)(*inputs, **named)

    actual.forward = one_forward
    got = actual.generate(**options)
    assert torch.equal(got, wanted)
    assert calls.kernels == 7 * LAYERS
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 3, f"{graphs} graphs for 6 tokens"


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (MistralConfig, "padding"),
        pytest.param(LlamaConfig, "nothing", marks=pytest.mark.long),
        pytest.param(LlamaConfig, "packed", marks=pytest.mark.long),
        pytest.param(MistralConfig, "nothing", marks=pytest.mark.long),
        pytest.param(MistralConfig, "packed", marks=pytest.mark.long),
    ],
)
def test_with_the_mask_outside_the_graph_the_kernels_run(config, given, calls):
    expected, actual = pair(AutoModelForCausalLM, config())
    inputs, rows = inputs_with(given, use_cache=False)
    compiled = torch.compile(actual, backend="aot_eager")
    for model in (compiled, expected):
        model(**inputs).logits[rows].square().sum().backward()
    for (name, one), other in zip(actual.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert calls.kernels == LAYERS


@torch.no_grad()
@pytest.mark.parametrize("given", ["padding", "packed"])
def test_a_layer_is_compiled_once_for_batches_of_all_lengths(given, calls):
    """Batches differ in the longest of their sequences, too."""
    expected, actual = pair(AutoModelForCausalLM, LlamaConfig(max_position_embeddings=512))
    for layer in actual.model.layers:
        layer.compile(fullgraph=True, backend="eager")
    for length in (12, 40, 9, 70, 130, 25, 260, 18):
        ids = tokens(length)
        starts = torch.randint(1, length - 2, (BATCH, 1))
        places = torch.arange(length)
        inputs, rows = {"attention_mask": (places >= starts).long()}, places >= starts
        if given == "packed":
            positions = torch.where(places < starts, places, places - starts)
            inputs, rows = {"position_ids": positions}, torch.ones_like(ids).bool()
        got, wanted = (model(ids, use_cache=False, **inputs)[0] for model in (actual, expected))
        torch.testing.assert_close(got[rows], wanted[rows], rtol=1e-4, atol=1e-5)
    assert calls.kernels == 8 * LAYERS
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 3, f"{graphs} graphs for 8 batches"


@torch.no_grad()
@pytest.mark.long
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize(
    "family", ["bart", "bert", "modernbert", "pegasus_x", "splinter", "t5", "whisper"]
)
def test_a_compiled_family_computes_what_transformers_computes(family, side):
    """pegasus_x and splinter have no sdpa, and layers that do not say whether they are causal."""
    expected, actual = families.built(family)
    inputs = accepted(expected, BATCH, LENGTH)
    mask = None if side == "none" else padding(side)
    if mask is not None and "input_ids" in inputs:
        inputs["attention_mask"] = mask
    compiled = torch.compile(actual, backend="aot_eager")
    got, wanted = compiled(**inputs)[0], expected(**inputs)[0]
    close(got, wanted, mask, family)


@torch.no_grad()
@pytest.mark.long
def test_a_mask_that_was_made_outside_goes_to_sdpa_in_a_graph(calls):
    """What a compiled layer cannot do with a description, it does with the dense mask."""
    expected, actual = pair(AutoModelForCausalLM, LlamaConfig())
    for model in (expected, actual):
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train()
    ids = tokens()
    results = []
    for model in (actual, expected):
        cache = StaticCache(model.config, max_cache_len=20)
        embeds = model.get_input_embeddings()(ids)
        mask = create_masks_for_generate(model.config, embeds, padding("left"), cache)
        forward = torch.compile(model, fullgraph=model is actual, backend="aot_eager")
        torch.manual_seed(5)
        results.append(forward(ids, attention_mask=mask, cache=cache).logits)
    rows = padding("left").bool()
    torch.testing.assert_close(results[0][rows], results[1][rows], rtol=1e-4, atol=1e-5)
    assert calls.kernels == 0
