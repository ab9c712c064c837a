"""Encoders of transformers: text, sentences, and the vision tower of a language model."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.clients.contenders import OURS
from benchmarks.clients.language_models import built, gradients, padding, tokens
from benchmarks.clients.workload import Place, Results, Step, Workload, loss


def modern_bert(implementation: str, place: Place, *, padded: bool) -> Step:
    import transformers

    config = transformers.ModernBertConfig(
        vocab_size=place.size(50_368, 64), hidden_size=place.size(1024, 64),
        intermediate_size=place.size(2624, 96), num_hidden_layers=place.size(12, 3),
        num_attention_heads=place.size(16, 4), local_attention=place.size(128, 8), pad_token_id=0,
        bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1,
    )  # fmt: skip
    model = built(config, implementation, place)
    batch, rows = 8, place.size(2048, 32)
    inputs = {"input_ids": tokens(place, batch, rows, config.vocab_size)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if padded:
        inputs["attention_mask"] = padding(place, batch, rows, "right")
    valid = inputs["attention_mask"].bool()

    def step() -> Results:
        model.zero_grad(set_to_none=True)
        hidden = model(**inputs).last_hidden_state[valid]
        loss(hidden).backward()
        return {"hidden": hidden.detach()} | gradients(model)

    return step


def sentences(implementation: str, place: Place) -> Step:
    """Makes the embedding of a batch of sentences of different lengths, the mean over a sentence's
    tokens."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=place.size(30_522, 64), hidden_size=place.size(768, 64),
        intermediate_size=place.size(3072, 96), num_hidden_layers=place.size(12, 2),
        num_attention_heads=place.size(12, 4), pad_token_id=0,
    )  # fmt: skip
    model = built(config, implementation, place).eval()
    batch, rows = place.size(128, 4), place.size(512, 24)
    inputs = tokens(place, batch, rows, config.vocab_size)
    mask = padding(place, batch, rows, "right")

    @torch.no_grad()
    def step() -> Results:
        hidden = model(input_ids=inputs, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return {"embedding": (hidden * weight).sum(1) / weight.sum(1)}

    return step


def vision_tower(implementation: str, place: Place) -> Step:
    """Makes the forward over pictures of different sizes, whose patches lie one behind another."""
    import transformers
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    config = transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
        depth=place.size(8, 2), hidden_size=place.size(1280, 64),
        intermediate_size=place.size(3420, 96), num_heads=place.size(16, 4),
        out_hidden_size=place.size(3584, 64), fullatt_block_indexes=[place.size(7, 1)],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(place.device):
        tower = qwen.Qwen2_5_VisionTransformerPretrainedModel._from_config(
            config, attn_implementation=implementation
        )
    tower = place.values(tower).eval()
    if implementation == OURS:
        from fa4_ext.integrations.transformers import join_vision_calls

        join_vision_calls(tower)
    sides = [
        (place.size(rows, 8), place.size(columns, 12)) for rows, columns in ((64, 64), (32, 48))
    ]
    grid = torch.tensor([(1, *side) for side in sides * place.size(4, 1)], device=place.device)
    pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches = place.normal(int(grid.prod(-1).sum()), pixels)

    @torch.no_grad()
    def step() -> Results:
        found = tower(patches, grid_thw=grid)
        return {"features": found if isinstance(found, torch.Tensor) else found[0]}

    return step


WORKLOADS = (
    Workload("ModernBERT", partial(modern_bert, padded=False)),
    Workload("ModernBERT, padded", partial(modern_bert, padded=True)),
    Workload("sentence encoder", sentences),
    Workload("Qwen-VL's vision tower", vision_tower),
)
