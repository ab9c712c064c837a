"""Models whose own code works on the mask, or passes layers more than the interface names."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from clients import families
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV4Config,
    Gemma4TextConfig,
    MiniMaxM3VLTextConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import masking_utils as hf

from fa4_ext.integrations.transformers.attention import attention
from fa4_ext.integrations.transformers.compact import CompactMask
from fa4_ext.integrations.transformers.masks import make_mask

BATCH, LENGTH = 3, 12


def pair(auto: type, config: PreTrainedConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Returns models with transformers' attention and with fa4_ext's, and equal weights."""
    models = []
    for name in (None, "fa4_ext"):
        torch.manual_seed(0)
        models.append(auto.from_config(copy.deepcopy(config), attn_implementation=name).eval())
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.add_(0.1)
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


def tokens() -> torch.Tensor:
    return torch.randint(3, families.VOCABULARY // 2, (BATCH, LENGTH))


def padding() -> torch.Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :7] = 0
    return mask


def assert_same_logits(models, ids: torch.Tensor, **given) -> None:
    wanted, got = (model(ids, **given).logits for model in models)
    seen = given.get("attention_mask", torch.ones_like(ids))[:, -wanted.shape[1] :].bool()
    torch.testing.assert_close(got[seen], wanted[seen], rtol=1e-4, atol=1e-4)


def gemma4() -> tuple[PreTrainedModel, PreTrainedModel]:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = families.small(Gemma4TextConfig(num_hidden_layers=4, layer_types=kinds))
    config.num_hidden_layers, config.layer_types = 4, kinds
    config.num_kv_shared_layers, config.sliding_window = 2, 6
    return pair(AutoModelForCausalLM, config)


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_the_last_queries_alone_see_all_keys_before_them(kept):
    """Gemma 4 hands its layers that share keys the last queries and rows of the mask only."""
    models = gemma4()
    assert_same_logits(models, tokens(), logits_to_keep=kept)
    assert_same_logits(models, tokens(), logits_to_keep=kept, attention_mask=padding())


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_layers_that_share_keys_generate_the_same(cache):
    expected, actual = gemma4()
    options = dict(
        max_new_tokens=3, do_sample=False, cache_implementation=cache, disable_compile=True,
        eos_token_id=None, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids = tokens()
    wanted, got = (model.generate(ids, **options).logits for model in (expected, actual))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blocks_of_keys_are_selected():
    kinds = ["full_attention", "minimax_m3_sparse"]
    config = families.small(MiniMaxM3VLTextConfig(num_hidden_layers=2, layer_types=kinds))
    models = pair(AutoModel, config)
    indexers = [layer.self_attn.indexer for layer in models[1].layers]
    assert any(indexer is not None for indexer in indexers)
    ids = tokens()
    for mask in (torch.ones(BATCH, LENGTH, dtype=torch.long), padding()):
        wanted, got = (model(ids, attention_mask=mask)[0] for model in models)
        torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compressed_keys_beside_the_mask_are_seen():
    """DeepSeek V4 appends columns to the mask, which are added to the scores."""
    rates = {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    config = families.small(DeepseekV4Config(compress_rates=rates))
    models = pair(AutoModelForCausalLM, config)
    assert_same_logits(models, tokens())
    assert_same_logits(models, tokens(), attention_mask=padding())


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_without_sdpa_gets_a_mask_that_it_can_add(padded):
    config = DeepseekV4Config(num_hidden_layers=1)
    arguments = dict(batch_size=BATCH, q_length=LENGTH, kv_length=LENGTH, config=config)
    if padded:
        arguments["attention_mask"] = padding().bool()
    mask = make_mask(**arguments, dtype=torch.float32)
    dense = hf.eager_mask(**arguments, dtype=torch.float32)
    assert isinstance(mask, CompactMask) and mask.dtype == torch.float32
    assert torch.equal(torch.cat([mask, mask], -1), torch.cat([dense, dense], -1))
    assert torch.equal(mask + 1.0, dense + 1.0)


@pytest.mark.parametrize("q_length", [4, LENGTH])
def test_without_a_mask_nothing_is_hidden_from_a_model_without_sdpa(q_length):
    """It always gets a causal mask, so that a missing one is that of an encoder, or of the keys of
    another sequence."""
    config = DeepseekV4Config(num_hidden_layers=1)
    function = hf.bidirectional_mask_function
    place = dict(batch_size=BATCH, q_length=LENGTH, kv_length=LENGTH, mask_function=function)
    assert make_mask(**place, config=config, allow_is_bidirectional_skip=True) is None
    module = torch.nn.Module()
    module.config, module.is_causal = config, True
    query, key, value = (torch.randn(BATCH, 4, n, 8) for n in (q_length, LENGTH, LENGTH))
    got = attention(module, query, key, value, None)[0]
    wanted = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("added", ["in place", "behind", "before"])
def test_a_boolean_mask_that_is_added_to_scores_is_refused(added):
    mask = make_mask(batch_size=1, q_length=4, kv_length=4, attention_mask=torch.eye(4)[:1].bool())
    assert isinstance(mask, CompactMask) and mask.dtype == torch.bool
    scores = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="boolean mask was added to the scores"):
        match added:
            case "in place":
                scores += mask
            case "behind":
                scores + mask
            case "before":
                mask + scores
    assert torch.equal(mask + torch.ones(4, 4, dtype=torch.long) > 1, mask | mask)
