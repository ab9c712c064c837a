"""The configuration of modeling_by_index.py."""

from __future__ import annotations

from transformers import PreTrainedConfig


class ByIndexConfig(PreTrainedConfig):
    model_type = "by_index"
    hidden_size = 16
    num_hidden_layers = 1
