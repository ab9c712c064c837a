"""Builds small random models of the families that transformers ships, from their configurations.

A default configuration is made small by the names of its attributes, and its nested ones too.
Families that do not work like that are left out, with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from clients.inputs import VOCABULARY
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WINDOW = 4
LARGEST = 40_000_000  # parameters of a model that counts as small

# The values that make a model small, and the attributes that get them.
LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "depth", "num_blocks", "num_decode_layers",
    "layers", "decoder_num_layers", "mit_num_hidden_layers", "memory_attention_num_layers",
)  # fmt: skip
SMALL = (
    (32, (
        "hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "emb_dim",
        "attention_hidden_size", "encoder_hidden_size", "decoder_hidden_size", "projection_dim",
        "encoder_embed_dim", "decoder_embed_dim", "word_embed_proj_dim", "mlp_dim", "width",
        "out_hidden_size", "hidden_dim", "vision_hidden_size", "hidden_size_per_layer_input",
        "lru_width", "text_embed_dim", "entity_emb_size", "pooler_hidden_size", "model_dim",
        "image_size", "upsample_groups", "projector_hidden_size", "moe_hidden_size",
        "cross_attention_hidden_size", "cross_hidden_size", "text_hidden_size",
        "hidden_size_global", "projection_hidden_dim", "vision_output_dim", "projector_input_dim",
        "projector_output_dim", "n_window_infer", "fpn_hidden_size", "output_channels",
        "base_channels", "latent_channels", "descriptor_dim", "descriptor_decoder_dim",
        "decoder_hidden_dim", "nemo_conv_channels", "ext_pw_out_channel", "adapter_in_dim",
        "adapter_out_dim", "adapter_input_size",
        "depthwise_separable_out_channel", "mit_hidden_size",
    )),
    (48, (
        "intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
        "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_dim",
        "ffn_hidden_size", "dim_feedforward", "dense_intermediate_size",
        "shared_intermediate_size", "expert_ffn_hidden_size", "memory_fuser_intermediate_dim",
        "memory_attention_feed_forward_hidden_size", "memory_attention_mlp_hidden_size",
        "perceiver_resampler_mlp_intermediate_size", "task_encoder_hidden_dim",
        "mit_intermediate_size", "encoder_dim_feedforward", "decoder_dim_feedforward",
    )),
    (2, LAYER_COUNTS),
    (4, (
        "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads",
        "decoder_attention_heads", "num_global_attention_heads", "attention_heads",
        "cross_num_attention_heads", "num_queries", "image_embedding_size",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        "decoder_num_heads", "mit_num_attention_heads",
    )),
    (2, (
        "num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "num_experts_per_tok",
        "num_experts_per_token",
        "num_global_key_value_heads", "swa_num_key_value_heads", "num_frames", "moe_k", "top_k",
        "top_k_experts", "cross_num_key_value_heads", "linear_num_heads", "linear_num_key_heads",
        "linear_num_value_heads",
    )),
    (8, (
        "head_dim", "d_kv", "attention_head_dim", "qk_nope_head_dim", "v_head_dim", "patch_size",
        "qk_rope_head_dim", "global_head_dim", "num_mel_bins", "attention_head_size",
        "index_head_dim", "swa_head_dim", "swa_v_head_dim", "linear_key_head_dim",
        "linear_value_head_dim", "rotary_dim", "n_window", "cross_head_dim",
        "mamba_chunk_size", "mamba_n_heads", "mamba_d_head", "n_mamba_heads", "mamba_headdim",
        "linear_head_dim", "mamba_num_heads", "mamba_head_dim",
    )),
    (16, ("kv_lora_rank", "q_lora_rank", "o_lora_rank", "index_topk", "num_pos_feats")),
    (1, ("n_shared_experts", "num_shared_experts", "n_group", "num_expert_group", "topk_group",
         "first_k_dense_replace", "bos_token_id", "partial_rotary_factor",
         "decoder_start_token_id")),
    (VOCABULARY, ("vocab_size", "vocab_size_per_layer_input", "encoder_hash_byte_group_vocab")),
    (64, ("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx",
          "max_source_positions", "attention_chunk_size", "mamba_d_ssm")),
    (128, ("memory_attention_hidden_size", "memory_encoder_hidden_size", "memory_fuser_embed_dim",
           "mask_downsampler_embed_dim")),
    (WINDOW, ("sliding_window", "local_attention", "attention_window", "window_size")),
    (0, ("pad_token_id",)),
    (2, ("eos_token_id",)),
    (3, ("num_channels",)),
)  # fmt: skip
SMALL_BY_NAME = {name: value for value, names in SMALL for name in names}
# These names of SMALL_BY_NAME leave the widths as they are.
SHALLOW = {
    *LAYER_COUNTS, "vocab_size", "vocab_size_per_layer_input", "pad_token_id", "bos_token_id",
    "eos_token_id", "decoder_start_token_id", "num_experts", "num_local_experts",
    "n_routed_experts", "moe_num_experts", "max_source_positions",
}  # fmt: skip
FILLED = {
    "vocab_size", "num_experts", "n_routed_experts", "top_k_experts", "moe_intermediate_size",
    "num_experts_per_tok", "n_group", "topk_group", "hidden_size", "num_key_value_heads",
    "pad_token_id", "head_dim", "index_head_dim", "n_shared_experts", "sliding_window",
}  # fmt: skip
# The ways to make a configuration small, which are tried one after the other: all widths, the same
# with what is None by default, and only the numbers of layers, experts and tokens.
WAYS = ("narrow", "filled", "shallow")
# Trackers of objects in videos have a memory of 64 numbers, and their states are wider.
TRACKER: dict[str, Any] = {
    "vision_config.fpn_hidden_size": 128,
    "prompt_encoder_config.hidden_size": 128,
    "mask_decoder_config.hidden_size": 128,
    "memory_attention_rope_feat_sizes": [2, 2],
}
# A detector takes states from these layers of its backbone.
DETECTOR: dict[str, Any] = {
    "stage_names": ["stem", "stage1", "stage2"],
    "_out_features": ["stage1", "stage2"],
    "_out_indices": [1, 2],
    "window_block_indices": [0],
}
# What families of these types cannot be built without, or not so small. A name with dots is that
# of a nested configuration's attribute.
SETTINGS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGBS8192A": 6}, "image_token_id": 5},
    "emu3": {
        "vocabulary_map": {
            "<image>": 5,
            "<|extra_200|>": 6,
            **{f"<|visual token {n:06}|>": 10 + n for n in range(8)},
        },
        "pad_token_id": 0,
        "image_token_id": 5,
    },
    "emu3_vqgan": {"codebook_size": 8, "hidden_size": 128},
    "lw_detr": {
        "projector_scale_factors": [1.0],
        "projector_in_channels": [32],
        "projector_out_channels": 32,
        "num_feature_levels": 1,
    },
    "qwen3_asr_encoder": {"n_window": 50, "n_window_infer": 100},
    "muse_spark_audio": {"hidden_sizes": [8, 16, 24, 32]},
    "neucodec": {"quantization_dim": 64, "num_key_value_heads": 4},
    "lw_detr_vit": DETECTOR,
    "rf_detr_vit": DETECTOR,
    "rf_detr_dinov2": DETECTOR,
    "rf_detr": {
        "projector_scale_factors": [1.0],
        "projector_in_channels": [32],
        "projector_out_channels": 32,
        "num_feature_levels": 1,
    },
    "align_vision_model": {"width_coefficient": 0.025, "depth_coefficient": 0.1},
    "bridgetower_text_model": {"hidden_size": 64},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [32, 32]},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2, "depths": [1] * 7},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 2, "depths": [1] * 7},
    "inkling2_loop_text": {
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "n_layers_per_attn_res_block": 1,
    },
    "fun_asr_nano_encoder": {"max_position_embeddings": 128},
    "granite_speech5_encoder": {"context_size": 16, "num_key_value_heads": 4},
    "blt_global_transformer": {"hidden_size": 64, "head_dim": 16},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "molmo2_vision": {"num_position_embeddings": 16},
    "blt": {"num_hidden_layers": 2},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "qwen3_omni_moe_audio_encoder": {"n_window": 50, "n_window_infer": 100},
    "lightglue": {"intermediate_size": 64},
    "omdet-turbo": {
        "timm_kwargs": {},
        "vision_features_channels": [32] * 3,
        "encoder_in_channels": [8, 16, 24],
        "text_projection_in_dim": 32,
        "text_projection_out_dim": 32,
        "class_embed_dim": 32,
    },
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "deepseek_v4": {"o_groups": 2},
    "minimax_m3_vl_text": {
        "index_block_size": 2,
        "index_topk_blocks": 2,
        "index_n_heads": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "bridgetower": {"hidden_size": 64},
    "bridgetower_vision_model": {"hidden_size": 64},
    "esmc": {"num_key_value_heads": 4},
    "llama4_vision_model": {"intermediate_size": 128},
    "longcat_flash": {"qk_head_dim": 16},
    "swin": {
        "num_heads": [2, 2, 4, 4],
        "depths": [1, 1, 1, 1],
        "window_size": 2,
        "image_size": 64,
        "patch_size": 4,
    },
    "sam2_hiera_det_model": {
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 48, 64],
        "blocks_per_stage": [1, 1, 2, 1],
        "num_attention_heads_per_stage": [1, 2, 3, 4],
        "global_attention_blocks": [3],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [64, 48, 32, 16],
        "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]],
    },
    "sam2_prompt_encoder": {"patch_size": 16},
    "sam2_video_prompt_encoder": {"patch_size": 16},
    "sam2_video": TRACKER,
    "edgetam_video_prompt_encoder": {"patch_size": 16},
    "edgetam_video": {
        **TRACKER,
        "memory_attention_rope_k_sizes": [2, 2],
        "perceiver_resampler_num_latents": 4,
        "perceiver_resampler_num_latents_2d": 4,
    },
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1, 1, 1, 1],
    },
    "xcodec2": {"quantization_dim": 64, "num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 32]},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "hybrid_layer_ids": [1],
    },
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2]},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam3_tracker_video": {**TRACKER, "image_size": 32},
    "florence_vision": {
        "embed_dim": [16, 16, 32, 32],
        "num_heads": [2, 2, 4, 4],
        "num_groups": [2, 2, 4, 4],
        "depths": [1, 1, 1, 1],
    },
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 192},
    "informer": {"prediction_length": 4, "context_length": 4},
    "time_series_transformer": {"prediction_length": 4, "context_length": 4},
    "xmod": {"default_language": "en_XX"},
}
# Layers that look the attention function up by a wrong way, and find their eager one always.
ALWAYS_EAGER = {"Kosmos2_5VisionAttention"}
WITHOUT_DROPOUT = ("dropout", "drop_rate", "pdrop", "layerdrop")


class NotGeneric(Exception):
    """Says why a family is left out."""


class NoInterface(NotGeneric):
    """Says that no layer of a family calls attention by the interface."""


def small(config: PreTrainedConfig, way: str = "narrow") -> PreTrainedConfig:
    """Makes a configuration small, in place, and returns it.

    Args:
        config: the configuration.
        way: one of `WAYS`.
    """
    kept = _layers_kept(config)
    staged = "depths" in vars(config)  # of each stage, the widths grow from one to the next
    tokens = 3
    for name, value in list(vars(config).items()):
        known = config.attribute_map.get(name, name)
        if isinstance(value, PreTrainedConfig):
            setattr(config, name, small(value, way))
        elif name == "rope_parameters" and isinstance(value, dict) and "rope_theta" in value:
            if value["rope_theta"] is None:
                value["rope_theta"] = 10000.0
            if way != "shallow":
                value["mrope_section"] = [1, 1, 2]
            if way == "filled" and "partial_rotary_factor" in value:
                value["partial_rotary_factor"] = 1.0
        elif name.endswith(WITHOUT_DROPOUT) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif known == "window_size" and hasattr(config, "spatial_merge_size"):  # in pixels
            setattr(config, name, 32)
        elif known == "image_size" and isinstance(value, list | tuple):
            setattr(config, name, type(value)([SMALL_BY_NAME["image_size"]] * len(value)))
        elif staged and (isinstance(value, list | tuple) or known in LAYER_COUNTS):
            continue
        elif known in LAYER_COUNTS and _is_number(value) and value in kept:
            setattr(config, name, len(kept[value]))
        elif known in SMALL_BY_NAME and (way != "shallow" or known in SHALLOW):
            if _is_number(value):
                setattr(config, known, type(value)(SMALL_BY_NAME[known]))
            elif value is None and way == "filled" and known in FILLED:
                setattr(config, known, SMALL_BY_NAME[known])
        elif isinstance(value, list | tuple) and len(value) in kept:
            setattr(config, name, type(value)(value[layer] for layer in kept[len(value)]))
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            setattr(config, name, VOCABULARY - tokens)
            tokens += 1
    heads = vars(config).get("num_attention_heads")
    if way != "shallow" and heads and vars(config).get("kv_lora_rank"):
        config.num_key_value_heads = heads  # the latent is expanded to all heads
    if way == "shallow" and _is_number(getattr(config, "image_size", None)):
        patch = getattr(config, "patch_size", 16)
        config.image_size = 4 * (patch if _is_number(patch) else 16)
    for name in ("pad_token_id", "vocab_size"):
        if way == "filled" and not hasattr(config, name):
            setattr(config, name, SMALL_BY_NAME[name])
    for name, value in SETTINGS.get(config.model_type, {}).items():
        *outer, last = name.split(".")
        setattr(functools.reduce(getattr, outer, config), last, value)
    if config.model_type in ("timm_backbone", "timm_wrapper"):  # they need another package
        return small(
            ResNetConfig(
                depths=[1] * 4,
                hidden_sizes=[8, 16, 24, 32],
                hidden_size=32,
                model_args={"embed_dim": 32},
                embedding_size=8,
                layer_type="basic",
                out_indices=[1, 2, 3],
            )
        )
    return config


def _layers_kept(config: PreTrainedConfig) -> dict[int, list[int]]:
    """Returns for each number of layers those to keep: one of each kind, and at least two."""
    values = vars(config).values()
    lists = [value for value in values if isinstance(value, list | tuple) and len(value) > 2]
    kept = {}
    for count in {vars(config).get(name) for name in LAYER_COUNTS} & {len(one) for one in lists}:
        named = [one for one in lists if len(one) == count and isinstance(one[0], str)]
        kinds = list(zip(*named, strict=True))
        kept[count] = sorted({kinds.index(kind) for kind in kinds})[:4]
        if len(kept[count]) < 2:
            kept[count] = [0, count - 1]
    return kept


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def families() -> list[str]:
    """Returns the model types that transformers maps to a model."""
    mapped = modeling_auto.MODEL_MAPPING_NAMES
    return sorted(name for name in CONFIG_MAPPING if name in mapped)


def model_classes(family: str) -> list[type[PreTrainedModel]]:
    """Returns the family's models: with a head for the next token first, the plain model last."""
    module = importlib.import_module(type(CONFIG_MAPPING[family]()).__module__.rpartition(".")[0])
    found = []
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    ):
        name = names.get(family)
        name = name[0] if isinstance(name, tuple | list) else name
        if name is not None:
            found.append(getattr(module, name, None) or getattr(transformers, name, None))
    return [model for model in found if model is not None]


def built(
    family: str, *, own_attention: bool = False, way: str = "narrow"
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Returns two small models with the same random weights: one with transformers' own attention,
    sdpa where the family supports it, or eager, and one with fa4_ext's.

    Args:
        family: the model type.
        own_attention: whether the family has to compute attention by itself, or must not.
        way: how to make it small, one of `WAYS`.

    Raises:
        NotGeneric: the family is left out.
    """
    found, config = _chosen(family, way)
    if own_attention and found._can_set_attn_implementation():
        raise NotGeneric("it does not compute attention by itself")
    own = "eager" if own_attention else None  # None is sdpa for all parts that support it
    try:
        torch.manual_seed(0)
        expected = found._from_config(copy.deepcopy(config), attn_implementation=own).eval()
        if not own_attention and not attention_layers(expected):
            raise NoInterface("no layer calls attention by the interface")
        actual = _with_fa4_ext(found, config).eval()
    except NotGeneric:
        raise
    except Exception as error:
        raise NotGeneric(f"it cannot be built: {error!r}") from error
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.dim() > 1:
                inputs = max(1, parameter.shape[1:].numel())
                parameter.normal_(std=min(0.2, inputs**-0.5))
            else:  # a sink of zero, for example, would show nothing
                parameter.add_(torch.randn_like(parameter) * 0.1).nan_to_num_()
    actual.load_state_dict(expected.state_dict())
    return expected, actual


def _chosen(family: str, way: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Returns the first of the family's models that can be built, and a small configuration.

    Raises:
        NotGeneric: none can be built, or none is small.
    """
    reasons = []
    try:
        models = model_classes(family)
        config = small(CONFIG_MAPPING[family](), way)
        choices = [(found, config) for found in models]
        choices += [(found, one) for found in models for one in _nested(config, found.config_class)]
        for found, config in choices:
            try:
                with torch.device("meta"):
                    empty = found._from_config(copy.deepcopy(config))
            except Exception as error:
                reasons.append(repr(error))
                continue
            size = sum(parameter.numel() for parameter in empty.parameters())
            if size <= LARGEST:
                return found, config
            reasons.append(f"{size} parameters after making it small")
    except Exception as error:
        reasons.append(repr(error))
    if not uses_interface(family):
        raise NoInterface("no layer calls attention by the interface")
    raise NotGeneric(f"it cannot be built: {reasons or 'no model'}")


def _nested(config: PreTrainedConfig, of_class: type) -> list[PreTrainedConfig]:
    """Returns the configuration's own ones of a class, for a model of one part of a family."""
    return [one for one in vars(config).values() if type(one) is of_class]


def uses_interface(family: str) -> bool:
    """Returns whether the code of a family, or of a part of it, calls attention by the interface.

    It is asked of families that cannot be built.
    """
    configs = [CONFIG_MAPPING[family]()]
    for config in configs:
        configs += [one for one in vars(config).values() if isinstance(one, PreTrainedConfig)]
        name = type(config).__module__.replace("configuration_", "modeling_")
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            continue
        if "ALL_ATTENTION_FUNCTIONS.get" in pathlib.Path(found.origin).read_text():
            return True
    return False


def _with_fa4_ext(found: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Returns a model with fa4_ext's attention. Where it looks some classes up by the name of the
    implementation, in a list of its own, it gets the name when it is built.
    """
    try:
        return found._from_config(copy.deepcopy(config), attn_implementation="fa4_ext")
    except KeyError as error:
        if error.args != ("fa4_ext",):
            raise
    model = found._from_config(copy.deepcopy(config))
    if not attention_layers(model):
        raise NotGeneric("it knows a list of implementations only")
    model.set_attn_implementation("fa4_ext")
    return model


def attention_layers(model: torch.nn.Module) -> set[type]:
    """Returns the classes of the model's layers that call attention by the interface."""
    return {
        type(module)
        for module in model.modules()
        if _calls_interface(type(module)) and type(module).__name__ not in ALWAYS_EAGER
    }


@functools.cache
def _calls_interface(layer: type) -> bool:
    """Returns whether one of the layer's own functions looks up the attention function."""
    functions = (
        inspect.unwrap(found)
        for parent in layer.__mro__
        if parent.__module__.startswith("transformers.models.")
        for found in vars(parent).values()
        if inspect.isfunction(found)
    )
    return any("ALL_ATTENTION_FUNCTIONS" in found.__code__.co_names for found in functions)


def parts(
    expected: PreTrainedModel, actual: PreTrainedModel
) -> Iterator[tuple[str, PreTrainedModel, PreTrainedModel]]:
    """Yields the models, and the models in them, which a family of several parts has."""
    for name, part in expected.named_modules():
        if isinstance(part, PreTrainedModel) and attention_layers(part):
            yield name, part, actual.get_submodule(name)


@contextlib.contextmanager
def layers_called() -> Iterator[set[type]]:
    """Gives the set of classes of layers that call fa4_ext's attention function meanwhile."""
    called: set[type] = set()
    mapping = AttentionInterface._global_mapping
    original = mapping["fa4_ext"]

    def attention(module: torch.nn.Module, *arguments: Any, **others: Any) -> Any:
        called.add(type(module))
        return original(module, *arguments, **others)

    mapping["fa4_ext"] = attention
    try:
        yield called
    finally:
        mapping["fa4_ext"] = original
