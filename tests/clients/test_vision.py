"""Vision towers that pack images of different sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from clients import families
from clients.inputs import accepted
from transformers import (
    AutoModel,
    LlamaConfig,
    Mistral3Config,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from fa4_ext.integrations.transformers import attention, join_vision_calls

IMAGES = 3


def tower_of(config, name: str) -> torch.nn.Module:
    """Returns a model whose vision tower is small."""
    config = families.small(config)
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    config.vision_config.window_size = 32  # in pixels, of Qwen2.5-VL: windows of 2 x 2 tokens
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation=name).eval()


@pytest.mark.parametrize("config", [Qwen2VLConfig, Qwen2_5_VLConfig, Qwen3VLConfig])
def test_a_vision_tower_calls_attention_once_a_layer(config, calls):
    expected, actual = (tower_of(config(), name) for name in ("sdpa", "fa4_ext"))
    actual.load_state_dict(expected.state_dict())
    inputs = accepted(actual.visual, 1, 1)
    wanted = expected.visual(**inputs)[0]
    split = actual.visual(**inputs)[0]
    layers = len(actual.visual.blocks)
    assert calls.kernels >= IMAGES * layers

    assert join_vision_calls(actual) == 1
    calls.clear()
    joined = actual.visual(**inputs)[0]
    assert (calls.kernels, calls.elsewhere) == (layers, 0)
    for got in (split, joined):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [Qwen2VLConfig, Qwen2_5_VLConfig, Qwen3VLConfig])
def test_joined_images_see_themselves_alone_without_kernels_too(config, calls, monkeypatch):
    monkeypatch.delitem(attention.DTYPES, "cpu")
    expected, actual = (tower_of(config(), name) for name in ("sdpa", "fa4_ext"))
    actual.load_state_dict(expected.state_dict())
    inputs = accepted(actual.visual, 1, 1)
    assert join_vision_calls(actual) == 1
    calls.clear()
    got, wanted = (model.visual(**inputs)[0] for model in (actual, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (calls.kernels, calls.elsewhere) == (0, len(actual.visual.blocks))


def test_the_joined_calls_leave_the_text_model_and_the_saved_configuration_alone(tmp_path, calls):
    model = tower_of(Qwen2VLConfig(), "fa4_ext")
    join_vision_calls(model)
    assert "flash" not in model.config.get_text_config()._attn_implementation
    assert model.config.vision_config._attn_implementation == "fa4_ext"
    model.save_pretrained(tmp_path)
    assert "fa4_ext" not in (tmp_path / "config.json").read_text()
    model.set_attn_implementation("sdpa")
    model.visual(**accepted(model.visual, 1, 1))
    assert (calls.kernels, calls.elsewhere) == (0, 0)


def test_a_joined_model_s_configuration_builds_others_that_are_not_joined():
    model = tower_of(Qwen2VLConfig(), "fa4_ext")
    join_vision_calls(model)
    for other in (AutoModel.from_config(model.config), type(model)(model.config)):
        assert "flash" not in other.visual.blocks[0].attn.config._attn_implementation
    assert "flash" in copy.deepcopy(model).visual.blocks[0].attn.config._attn_implementation


def test_a_tower_by_itself_is_joined(calls):
    tower = tower_of(Qwen2VLConfig(), "fa4_ext").visual
    assert join_vision_calls(tower) == 1
    inputs = accepted(tower, 1, 1)
    calls.clear()
    tower(**inputs)
    assert (calls.kernels, calls.elsewhere) == (len(tower.blocks), 0)


@pytest.mark.parametrize("inside", [False, True], ids=["by itself", "in a model"])
def test_a_tower_is_joined_that_gives_its_layers_the_bounds(calls, inside):
    """Pixtral's forward is decorated, and has bounds in place of a mask of blocks."""
    sizes = [(16, 24), (32, 32), (24, 8)]
    images = {"pixel_values": torch.randn(IMAGES, 3, 32, 32), "image_sizes": sizes}
    config = families.small(PixtralVisionConfig(patch_size=8))
    config.patch_size = 8
    if inside:
        text = families.small(MistralConfig())
        config = Mistral3Config(vision_config=config, text_config=text)
    expected, actual = (
        AutoModel.from_config(copy.deepcopy(config), attn_implementation=name).eval()
        for name in ("sdpa", "fa4_ext")
    )
    actual.load_state_dict(expected.state_dict())
    assert join_vision_calls(actual) == 1
    wanted, got = (
        (model.vision_tower if inside else model)(**images)[0] for model in (expected, actual)
    )
    layers = (config.vision_config if inside else config).num_hidden_layers
    assert (calls.kernels, calls.elsewhere) == (layers, 0)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_without_such_a_tower_is_left_as_it_is():
    model = AutoModel.from_config(families.small(LlamaConfig()), attn_implementation="fa4_ext")
    assert join_vision_calls(model) == 0


def test_another_implementation_is_refused():
    model = tower_of(Qwen2VLConfig(), "sdpa")
    with pytest.raises(ValueError, match="'sdpa', and not 'fa4_ext'"):
        join_vision_calls(model)
