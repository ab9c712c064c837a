"""Builds small random models of the families that transformers ships, from their configurations.

A default configuration is made small by the names of its attributes, and its nested ones too.
Families that do not work like that are left out, with the reason.
"""

from __future__ import annotations

import copy
import importlib
import inspect

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96
WINDOW = 4
LARGEST = 10_000_000  # parameters of a model that counts as small

# The values that make a model small, and the attributes that get them.
LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "depth", "num_blocks", "num_decode_layers",
)  # fmt: skip
SMALL = (
    (32, (
        "hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "emb_dim",
        "attention_hidden_size", "encoder_hidden_size", "decoder_hidden_size", "projection_dim",
        "encoder_embed_dim", "decoder_embed_dim", "word_embed_proj_dim", "mlp_dim", "width",
        "out_hidden_size", "hidden_dim", "vision_hidden_size", "hidden_size_per_layer_input",
        "lru_width", "text_embed_dim", "entity_emb_size", "pooler_hidden_size", "model_dim",
        "image_size",
    )),
    (48, (
        "intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
        "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_dim",
        "ffn_hidden_size", "dim_feedforward", "dense_intermediate_size",
    )),
    (2, LAYER_COUNTS),
    (4, (
        "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads",
        "decoder_attention_heads", "num_global_attention_heads", "attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    )),
    (2, (
        "num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "num_experts_per_tok",
        "num_global_key_value_heads", "swa_num_key_value_heads", "num_frames", "moe_k", "top_k",
    )),
    (8, (
        "head_dim", "d_kv", "attention_head_dim", "qk_nope_head_dim", "v_head_dim", "patch_size",
        "qk_rope_head_dim", "global_head_dim", "num_mel_bins", "attention_head_size",
        "index_head_dim", "swa_head_dim", "swa_v_head_dim", "linear_key_head_dim",
        "linear_value_head_dim",
    )),
    (16, ("kv_lora_rank", "q_lora_rank", "o_lora_rank", "index_topk")),
    (1, ("n_group", "topk_group", "first_k_dense_replace", "bos_token_id", "partial_rotary_factor",
         "decoder_start_token_id")),
    (VOCABULARY, ("vocab_size", "vocab_size_per_layer_input")),
    (64, ("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx",
          "max_source_positions", "attention_chunk_size")),
    (WINDOW, ("sliding_window", "local_attention", "attention_window", "window_size")),
    (0, ("pad_token_id",)),
    (2, ("eos_token_id",)),
    (3, ("num_channels",)),
)  # fmt: skip
SMALL_BY_NAME = {name: value for value, names in SMALL for name in names}
WITHOUT_DROPOUT = ("dropout", "drop_rate", "pdrop", "layerdrop")


class NotGeneric(Exception):
    """Says why a family is left out."""


def small(config: PreTrainedConfig) -> PreTrainedConfig:
    """Makes a configuration small, in place, and returns it."""
    layers = {vars(config).get(name) for name in LAYER_COUNTS}
    tokens = 3
    for name, value in list(vars(config).items()):
        known = config.attribute_map.get(name, name)
        if isinstance(value, PreTrainedConfig):
            small(value)
        elif name == "rope_parameters" and isinstance(value, dict) and "rope_theta" in value:
            value["mrope_section"] = [2, 1, 1]
        elif name.endswith(WITHOUT_DROPOUT) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif (
            known in SMALL_BY_NAME
            and isinstance(value, int | float)
            and not isinstance(value, bool)
        ):
            setattr(config, known, SMALL_BY_NAME[known])
        elif isinstance(value, list | tuple) and len(value) in layers and len(value) > 2:
            # The first and the last layer are of different kinds, if any are.
            setattr(config, name, type(value)([value[0], value[-1]]))
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            setattr(config, name, VOCABULARY - tokens)
            tokens += 1
    if getattr(config, "kv_lora_rank", None):  # latent attention expands the keys to all heads
        config.num_key_value_heads = config.num_attention_heads
    return config


def families() -> list[str]:
    """Returns the model types that transformers maps to a model."""
    mapped = modeling_auto.MODEL_MAPPING_NAMES
    return sorted(name for name in CONFIG_MAPPING if name in mapped)


def model_class(family: str) -> type[PreTrainedModel]:
    """Returns the family's model with a head for the next token, or else its plain model.

    Raises:
        NotGeneric: there is no single one, or it does not call attention by the interface.
    """
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    ):
        name = names.get(family)
        if isinstance(name, tuple | list):
            name = name[0]
        if name is None:
            continue
        module = importlib.import_module(
            type(CONFIG_MAPPING[family]()).__module__.rpartition(".")[0]
        )
        found = getattr(module, name, None)
        if found is not None:
            return found
    raise NotGeneric("no model")


def built(family: str, *, own_attention: bool = False) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Returns two small models with the same random weights: one with transformers' own attention,
    sdpa where the family supports it, or eager, and one with fa4_ext's.

    Args:
        family: the model type.
        own_attention: whether the family has to compute attention by itself, or must not.

    Raises:
        NotGeneric: the family is left out.
    """
    try:
        found = model_class(family)
        if found._can_set_attn_implementation() == own_attention:
            by_itself = "does not compute" if own_attention else "computes"
            raise NotGeneric(f"it {by_itself} attention by itself")
        config = small(CONFIG_MAPPING[family]())
        with torch.device("meta"):
            sizes = [p.numel() for p in found._from_config(copy.deepcopy(config)).parameters()]
        if sum(sizes) > LARGEST:
            raise NotGeneric(f"{sum(sizes)} parameters after making it small")
        own = "sdpa" if found._supports_sdpa and not own_attention else "eager"
        torch.manual_seed(0)
        expected = found._from_config(copy.deepcopy(config), attn_implementation=own).eval()
        actual = found._from_config(config, attn_implementation="fa4_ext").eval()
    except NotGeneric:
        raise
    except Exception as error:
        raise NotGeneric(f"it cannot be built: {error!r}") from error
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:  # a sink of zero, for example, would show nothing
                parameter.add_(torch.randn_like(parameter) * 0.1).nan_to_num_()
    actual.load_state_dict(expected.state_dict())
    return expected, actual


def inputs_of(model: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Returns random inputs.

    Raises:
        NotGeneric: the model takes other inputs than tokens or an image.
    """
    names = inspect.signature(model.forward).parameters
    if "grid_thw" in names:
        return _packed_images(model)
    inputs: dict[str, torch.Tensor] = {}
    if "input_ids" in names:
        inputs["input_ids"] = torch.randint(3, VOCABULARY // 2, (batch, length))
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY // 2, (batch, length - 2))
    needs_image = hasattr(model.config, "vision_config") and not (
        {"logits_to_keep", "image_grid_thw"} & set(names)
    )
    if model.main_input_name == "pixel_values" or needs_image:
        vision = getattr(model.config, "vision_config", model.config)
        size = getattr(vision, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.randn(batch, channels, height, width)
    if not inputs or model.main_input_name not in inputs:
        raise NotGeneric(f"it takes {model.main_input_name}")
    return inputs


def _packed_images(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns images of different sizes as the patches that a vision tower takes."""
    config = model.config
    grid = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 6, 4]])
    channels = getattr(config, "in_channels", getattr(config, "in_chans", 3))
    patch = channels * getattr(config, "temporal_patch_size", 1) * config.patch_size**2
    first = next(iter(inspect.signature(model.forward).parameters))
    return {first: torch.randn(int(grid.prod(1).sum()), patch), "grid_thw": grid}
