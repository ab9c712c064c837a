"""This module lets vision towers hand all images to one call.

Vision towers whose images have different sizes pack them, and give transformers' flash attention
the bounds. For every other implementation they split the images into a call each. They tell them
apart by "flash" in the name, which no name that `register` takes may contain.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

_ASKS = "is_flash_attention_requested"
_GIVES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


class PackedName(str):
    """The name of an implementation that takes packed sequences.

    It equals the plain name, but a search for "flash" in it succeeds.
    """

    __slots__ = ()

    def __contains__(self, part: object) -> bool:
        return part == "flash" or (isinstance(part, str) and str.__contains__(self, part))


def join_vision_calls(model: PreTrainedModel, name: str = "fa4_ext") -> int:
    """Makes the vision towers of a model call attention once a layer, and not once an image.

    Call it after the model's implementation was set, since setting it undoes this.

    Args:
        model: a model that was loaded with `attn_implementation=name`.
        name: the name that `register` got.

    Returns:
        The number of configurations that were changed: 0 if no tower packs images.

    Raises:
        ValueError: a vision tower uses another implementation.
    """
    text = model.config.get_text_config()
    configs = {
        id(module.config): module.config for module in model.modules() if _packs_sequences(module)
    }
    changed = [config for config in configs.values() if config is not text]
    for config in changed:
        if config._attn_implementation != name:
            raise ValueError(
                f"{type(config).__name__} uses the implementation {config._attn_implementation!r}, "
                f"and not {name!r}"
            )
        config._attn_implementation_internal = PackedName(name)
    return len(changed)


def _packs_sequences(module: torch.nn.Module) -> bool:
    """Returns whether the layer gives the bounds of packed sequences to flash attention only."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or not hasattr(module, "config") or _ASKS not in code.co_names:
        return False
    keywords = {name for found in code.co_consts if isinstance(found, tuple) for name in found}
    return keywords >= _GIVES
