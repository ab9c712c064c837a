"""Small models of the families that transformers ships, held to transformers' own attention."""

from __future__ import annotations

import pytest
import torch
from clients import families
from transformers import GenerationMixin

# Each of them stands for a way of calling attention; test_all_families runs all others.
COMMON = (
    "bart", "bert", "clip_text_model", "cohere2", "distilbert", "ernie", "exaone4", "gemma",
    "gemma2", "gemma3_text", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granite_swa", "llama",
    "llama4_text", "mistral", "mixtral", "modernbert", "mt5", "olmo3", "opt", "phi3",
    "qwen2_vl_text", "qwen2_5_vl", "qwen3", "roberta", "t5", "vit", "whisper",
)  # fmt: skip
WITH_GRADIENTS = ("bert", "gemma3_text", "gpt_oss", "llama", "mistral", "modernbert")
PARTS = 12
BATCH, LENGTH, NEW = 3, 12, 4


def padding(side: str) -> torch.Tensor | None:
    """Returns (batch, length), int64: where the tokens are no padding; None without padding."""
    if side == "none":
        return None
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    for row, count in ((0, 7), (2, 3)):
        mask[row, slice(count) if side == "left" else slice(LENGTH - count, None)] = 0
    return mask


def logits(model, inputs: dict, mask: torch.Tensor | None) -> torch.Tensor:
    torch.manual_seed(1)
    given = {} if mask is None else {"attention_mask": mask}
    return model(**inputs, **given)[0]


def close(one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None, what: str) -> None:
    """Asserts that results are equal where the tokens are no padding."""
    if mask is not None and one.shape[:2] == mask.shape:
        one, other = one[mask.bool()], other[mask.bool()]
    scale = other[other.isfinite()].abs().max().item()
    difference = (one - other).nan_to_num().abs().max().item()
    assert torch.equal(one.isnan(), other.isnan()), f"{what}: NaN in one of the two"
    assert difference <= 1e-4 * scale, f"{what}: differs by {difference}, results up to {scale}"


def other_padding(inputs: dict, mask: torch.Tensor) -> dict:
    """Returns the inputs with other tokens of padding."""
    tokens = inputs["input_ids"]
    return {**inputs, "input_ids": torch.where(mask.bool(), tokens, tokens.flip(0) // 2 + 3)}


def check(family: str) -> None:
    """Compares one family's results, padded on either side, and the tokens that it generates.

    Raises:
        NotGeneric: the family is left out.
    """
    expected, actual = families.built(family)
    inputs = families.inputs_of(expected, BATCH, LENGTH)
    sides = ("none", "left", "right") if "input_ids" in inputs else ("none",)
    for side in sides:
        mask, what = padding(side), f"{family}, padding {side}"
        try:
            wanted = logits(expected, inputs, mask)
        except Exception as error:
            raise families.NotGeneric(f"transformers' own attention raises {error!r}") from error
        got = logits(actual, inputs, mask)
        close(got, wanted, mask, what)
        if mask is not None:
            changed = other_padding(inputs, mask)
            independent = torch.allclose(
                logits(expected, changed, mask)[mask.bool()], wanted[mask.bool()], atol=1e-4
            ) if wanted.shape[:2] == mask.shape else False  # fmt: skip
            if independent:
                close(logits(actual, changed, mask), got, mask, f"{what}, changed padding")
    if isinstance(expected, GenerationMixin) and not expected.config.is_encoder_decoder:
        for side in ("none", "left"):
            for cache in ("dynamic", "static"):
                tokens_are_equal(expected, actual, inputs, padding(side), cache, family)


def tokens_are_equal(expected, actual, inputs, mask, cache: str, family: str) -> None:
    options = dict(
        max_new_tokens=NEW, do_sample=False, cache_implementation=cache, disable_compile=True,
        eos_token_id=None, attention_mask=mask, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    try:
        wanted = expected.generate(**inputs, **options)
    except Exception:  # this family does not generate like this
        return
    got = actual.generate(**inputs, **options)
    for step, (one, other) in enumerate(zip(got.logits, wanted.logits, strict=True)):
        what = f"{family}, {cache} cache, padding {mask is not None}, token {step}"
        close(one, other, None, what)


@torch.no_grad()
@pytest.mark.parametrize("family", COMMON)
def test_a_family_computes_what_transformers_computes(family):
    check(family)


@torch.no_grad()
@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_all_families_compute_what_transformers_computes(part):
    left_out, failed, ran = {}, {}, []
    for family in families.families()[part::PARTS]:
        try:
            check(family)
            ran.append(family)
        except families.NotGeneric as reason:
            left_out[family] = str(reason)
        except Exception as error:
            failed[family] = repr(error)[:300]
    assert not failed, "\n".join(f"{family}: {error}" for family, error in failed.items())
    share = len(ran) / (len(ran) + len(left_out))
    assert share > 0.25, f"{len(ran)} ran, left out: {left_out}"


@pytest.mark.parametrize(
    "family", ["bert", "gemma3_text", "gpt_oss", "llama", "mistral", "modernbert"]
)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_family_has_the_gradients_of_transformers(family, side):
    expected, actual = families.built(family)
    inputs = families.inputs_of(expected, BATCH, LENGTH)
    mask = padding(side)
    weight = torch.ones(BATCH, LENGTH) if mask is None else mask
    for model in (expected, actual):
        results = logits(model, inputs, mask)
        (results.sin() * weight[..., None]).sum().backward()
    for (name, one), other in zip(actual.named_parameters(), expected.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None, name
            continue
        difference = (one.grad - other.grad).abs().max().item()
        largest = other.grad.abs().max().item()
        assert difference <= 1e-3 * largest + 1e-5, f"{name}: {difference} of {largest}"


@torch.no_grad()
@pytest.mark.long
def test_a_family_that_computes_attention_by_itself_is_refused_or_right():
    refused, right, left_out = [], [], []
    for family in families.families():
        try:
            expected, actual = families.built(family, own_attention=True)
            inputs = families.inputs_of(expected, BATCH, LENGTH)
            wanted = logits(expected, inputs, padding("right"))
        except Exception:
            wanted = None
        if not isinstance(wanted, torch.Tensor):
            left_out.append(family)
            continue
        try:
            got = logits(actual, inputs, padding("right"))
        except (ValueError, KeyError) as error:
            assert "interface" in str(error) or "fa4_ext" in str(error), f"{family}: {error}"
            refused.append(family)
            continue
        close(got, wanted, padding("right"), family)
        right.append(family)
    assert len(refused) > 10, f"refused: {refused}\nright: {right}\nleft out: {left_out}"
