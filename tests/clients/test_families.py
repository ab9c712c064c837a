"""Small models of the families that transformers ships, held to transformers' own attention."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator

import pytest
import torch
from clients import families
from clients.inputs import VOCABULARY, accepted, with_images
from transformers import GenerationMixin, PreTrainedModel

# Each of them stands for a way of calling attention; test_all_families runs all others.
COMMON = (
    "bart", "bert", "clip_text_model", "cohere2", "distilbert", "ernie", "exaone4", "gemma",
    "gemma2", "gemma3_text", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granite_swa", "llama",
    "llama4_text", "mistral", "mixtral", "modernbert", "mt5", "olmo3", "opt", "phi3",
    "qwen2_vl_text", "qwen2_5_vl", "qwen3", "roberta", "t5", "vit", "whisper",
)  # fmt: skip
WITH_GRADIENTS = ("bert", "gemma3_text", "gpt_oss", "llama", "mistral", "modernbert")
PARTS = 12
# So many of the families of a part that call attention by the interface may be left out.
MOST_LEFT_OUT = 4
TOKENS = ("input_ids", "inputs_embeds", "hidden_states")
BATCH, LENGTH, NEW = 3, 12, 4


def padding(side: str) -> torch.Tensor | None:
    """Returns (batch, length), int64: where the tokens are no padding; None without padding."""
    if side == "none":
        return None
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    for row, count in ((0, 7), (2, 3)):
        mask[row, slice(count) if side == "left" else slice(LENGTH - count, None)] = 0
    return mask


def results(model, inputs: dict) -> list[torch.Tensor]:
    """Returns all results that are numbers, the first ones first; caches and weights, which only
    eager attention returns, do not count.
    """
    torch.manual_seed(1)
    found = model(**copy.deepcopy(inputs))
    values = found
    if isinstance(found, dict):
        values = [value for name, value in found.items() if not name.endswith("attentions")]
    return [value for value in _flat(values) if value.is_floating_point()]


def _flat(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _flat(one)]
    return list(_flat(list(value.values()))) if isinstance(value, dict) else []


def close(one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None, what: str) -> None:
    """Asserts that results are equal where the tokens are no padding."""
    rows = None if mask is None else rows_that_count(mask, other)
    if rows is not None:
        one, other = one[rows], other[rows]
    scale = other[other.isfinite()].abs().max().item() if other.isfinite().any() else 0.0
    difference = (one - other).nan_to_num().abs().max().item() if one.numel() else 0.0
    assert torch.equal(one.isnan(), other.isnan()), f"{what}: NaN in one of the two"
    assert difference <= 1e-4 * scale, f"{what}: differs by {difference}, results up to {scale}"


def rows_that_count(mask: torch.Tensor, result: torch.Tensor) -> torch.Tensor | None:
    """Returns which tokens of a result are no padding, or None if it has no tokens of the mask.

    Where the mask is one of frames, a result may have a token for several of them.
    """
    frames, tokens = mask.shape[1], result.shape[1] if result.dim() > 2 else 0
    if result.shape[0] != mask.shape[0] or not 0 < tokens <= frames:
        return None
    if frames == LENGTH and tokens != frames:
        return None
    last = (torch.arange(tokens) + 1) * frames // tokens - 1
    return mask[:, last].bool()


def masked(model, inputs: dict) -> Iterator[tuple[str, dict, torch.Tensor | None]]:
    """Yields masks that a model may take: the name, the arguments, and where results count."""
    names = inspect.signature(model.forward).parameters
    if "attention_mask" not in names or "attention_mask" in inputs:
        return
    tokens = next((inputs[n] for n in TOKENS if n in inputs), None)
    if tokens is not None and tokens.shape[:2] == (BATCH, LENGTH):
        for side in ("left", "right"):
            mask = padding(side)
            yield f"padding {side}", {"attention_mask": mask}, mask
        seen = torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.5
        seen |= torch.eye(LENGTH, dtype=torch.bool)
        if model.config._attn_implementation == "eager":  # which adds its mask
            seen = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        yield "a mask of its own", {"attention_mask": seen}, None
        if "position_ids" in names and not inputs.keys() - {"input_ids"}:
            packed = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(BATCH, -1)
            yield "packed", {"position_ids": packed, "use_cache": False}, None
    for name in ("input_values", "input_features"):
        if name not in inputs:
            continue
        frames = max(inputs[name].shape[1:])
        lengths = torch.tensor([frames, frames // 2, frames * 3 // 4])
        mask = (torch.arange(frames) < lengths[:, None]).long()
        yield "frames", {"attention_mask": mask}, mask


def compare(expected, actual, inputs: dict, what: str) -> None:
    """Compares a model's results, with the masks that it takes, and the tokens it generates."""
    for one, other in zip(results(actual, inputs), results(expected, inputs), strict=True):
        close(one, other, None, what)
    for name, given, mask in masked(expected, inputs):
        try:
            wanted = results(expected, {**inputs, **given})[0]
        except Exception:  # this family takes no such mask
            continue
        got = results(actual, {**inputs, **given})[0]
        counts = None if mask is None else rows_that_count(mask, wanted)
        tokens = inputs.get("input_ids")
        if mask is None or tokens is None or tokens.shape != mask.shape:
            close(got, wanted, mask, f"{what}, {name}")
            continue
        changed = {**inputs, **given, "input_ids": other_padding(tokens, mask)}
        of_changed = results(expected, changed)[0]
        rows = slice(None) if counts is None else counts
        independent = torch.allclose(of_changed[rows], wanted[rows], atol=1e-4, equal_nan=True)
        if independent or counts is not None:  # otherwise it reads the padding's own output
            close(got, wanted, mask, f"{what}, {name}")
        if independent:
            close(results(actual, changed)[0], got, mask, f"{what}, {name}, changed padding")


def other_padding(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the tokens with other tokens of padding."""
    return torch.where(mask.bool(), tokens, tokens.flip(0) // 2 + 3)


def generates_the_same(expected, actual, inputs: dict, what: str) -> None:
    if not isinstance(expected, GenerationMixin):
        return
    prompt = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    text = prompt.get("input_ids")
    sides = ("none", "left") if text is not None and text.shape == (BATCH, LENGTH) else ("none",)
    for side in sides:
        for cache in ("dynamic", "static"):
            tokens_are_equal(expected, actual, prompt, padding(side), cache, what)


def tokens_are_equal(expected, actual, inputs, mask, cache: str, family: str) -> None:
    options = dict(
        max_new_tokens=NEW, do_sample=False, cache_implementation=cache, disable_compile=True,
        eos_token_id=None, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    if mask is not None or "input_ids" in inputs:
        options["attention_mask"] = mask
    try:
        wanted = expected.generate(**inputs, **options)
        if not isinstance(wanted.logits, tuple):
            return
    except Exception:  # this family does not generate like this
        return
    got = actual.generate(**inputs, **options)
    for step, (one, other) in enumerate(zip(got.logits, wanted.logits, strict=True)):
        what = f"{family}, {cache} cache, padding {mask is not None}, token {step}"
        close(one, other, None, what)


def check(family: str) -> None:
    """Compares one family's results, in parts where it does not run as a whole.

    Raises:
        NotGeneric: some of the family's attention layers were not called.
    """
    reasons = []
    for way in families.WAYS:
        try:
            expected, actual = families.built(family, way=way)
        except families.NoInterface:
            raise
        except families.NotGeneric as reason:
            reasons.append(str(reason))
            continue
        with families.layers_called() as called:
            for name, one, other in families.parts(expected, actual):
                if families.attention_layers(one) <= called:
                    continue
                inputs = accepted(one, BATCH, LENGTH)
                if inputs is None:
                    reasons.append(f"no inputs for {type(one).__name__}")
                    continue
                what = f"{family} {name}".rstrip()
                compare(one, other, inputs, what)
                if not name:
                    generates_the_same(one, other, inputs, what)
            inputs = with_images(expected, BATCH)
            if inputs is not None:
                compare(expected, actual, inputs, f"{family} with images")
        if families.attention_layers(actual) <= called:
            return
    raise families.NotGeneric("; ".join(reasons) or "a layer was not called")


@torch.no_grad()
@pytest.mark.parametrize("family", COMMON)
def test_a_family_computes_what_transformers_computes(family):
    check(family)


@torch.no_grad()
@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_all_families_compute_what_transformers_computes(part):
    """Families in which no layer calls attention by the interface do not count."""
    left_out, failed, ran = {}, {}, []
    for family in families.families()[part::PARTS]:
        try:
            check(family)
            ran.append(family)
        except families.NoInterface:
            continue
        except families.NotGeneric as reason:
            left_out[family] = str(reason)
        except Exception as error:
            failed[family] = repr(error)[:300]
    assert not failed, "\n".join(f"{family}: {error}" for family, error in failed.items())
    report = f"{len(ran)} ran, {len(left_out)} left out: {left_out}"
    print(report)
    assert len(left_out) <= MOST_LEFT_OUT, report


@pytest.mark.parametrize(
    "family", ["bert", "gemma3_text", "gpt_oss", "llama", "mistral", "modernbert"]
)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_family_has_the_gradients_of_transformers(family, side):
    expected, actual = families.built(family)
    inputs = {"input_ids": torch.randint(3, VOCABULARY // 2, (BATCH, LENGTH))}
    mask = padding(side)
    if mask is not None:
        inputs["attention_mask"] = mask
    weight = torch.ones(BATCH, LENGTH) if mask is None else mask
    for model in (expected, actual):
        out = results(model, inputs)[0]
        (out.sin() * weight[..., None]).sum().backward()
    for (name, one), other in zip(actual.named_parameters(), expected.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None, name
            continue
        difference = (one.grad - other.grad).abs().max().item()
        largest = other.grad.abs().max().item()
        assert difference <= 1e-3 * largest + 1e-5, f"{name}: {difference} of {largest}"


def put_parts_on_sdpa(model: PreTrainedModel) -> None:
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part is not model and part._supports_sdpa:
            part.config._attn_implementation = "sdpa"


@torch.no_grad()
@pytest.mark.long
def test_a_family_that_computes_attention_by_itself_is_refused_or_right():
    refused, right, left_out = [], [], []
    for family in families.families():
        try:
            expected, actual = families.built(family, own_attention=True)
            inputs = accepted(expected, BATCH, LENGTH) or {}
            tokens = inputs.get("input_ids")
            if tokens is not None and tokens.shape == (BATCH, LENGTH):
                inputs.setdefault("attention_mask", padding("right"))
            wanted = results(expected, inputs)[0]
        except Exception:
            left_out.append(family)
            continue
        try:
            got = results(actual, inputs)[0]
        except (ValueError, KeyError) as error:
            assert "interface" in str(error) or "fa4_ext" in str(error), f"{family}: {error}"
            refused.append(family)
            continue
        try:
            close(got, wanted, inputs.get("attention_mask"), family)
        except AssertionError:  # the parts that have sdpa may differ from their own eager attention
            put_parts_on_sdpa(expected)
            close(got, results(expected, inputs)[0], inputs.get("attention_mask"), family)
        right.append(family)
    assert len(refused) > 10, f"refused: {refused}\nright: {right}\nleft out: {left_out}"
