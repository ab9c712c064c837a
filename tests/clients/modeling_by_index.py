"""A model that looks attention up as models did before transformers' table had get_interface."""

from __future__ import annotations

import torch
from clients.configuration_by_index import ByIndexConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class ByIndexAttention(nn.Module):
    def __init__(self, config: ByIndexConfig):
        super().__init__()
        self.config, self.is_causal = config, True

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return attend(self, heads, heads, heads, mask)[0].flatten(2)


class ByIndexModel(PreTrainedModel):
    config_class = ByIndexConfig
    _supports_sdpa = True

    def __init__(self, config: ByIndexConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(16, config.hidden_size)
        self.attention = ByIndexAttention(config)
        self.post_init()

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
        x = self.embedding(ids)
        return self.attention(x, create_causal_mask(self.config, x, attention_mask, None))
