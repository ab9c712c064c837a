"""A model in one file with its configuration, as on the Hub, that computes attention by itself."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask


class OwnConfig(PreTrainedConfig):
    model_type = "own_attention"
    hidden_size = 16
    num_hidden_layers = 1


class DerivedConfig(OwnConfig):
    model_type = "derived_from_own_attention"


class OwnAttention(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scores = x @ x.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask[:, 0]
        return scores.softmax(-1) @ x


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(16, config.hidden_size)
        self.attention = OwnAttention()
        self.post_init()

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
        x = self.embedding(ids)
        return self.attention(x, create_causal_mask(self.config, x, attention_mask, None))
