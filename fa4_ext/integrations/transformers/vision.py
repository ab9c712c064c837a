"""This module lets vision towers hand all images to one call.

Vision towers whose images have different sizes pack them, and give transformers' flash attention
the bounds. For every other implementation they split the images into a call each. They tell them
apart by "flash" in the name, which no name that `register` takes may contain.
"""

from __future__ import annotations

import copy
import inspect

import torch
from transformers import PreTrainedConfig, PreTrainedModel

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

    Call it after the implementations were set, since setting that of the whole model undoes this.
    The towers get configurations of their own, so that the model's builds other models as before.

    Args:
        model: a model that was loaded with `attn_implementation=name`, or a tower by itself.
        name: the name that `register` got.

    Returns:
        The number of configurations that were changed: 0 if no layer was found that gives bounds to
        flash attention alone.

    Raises:
        ValueError: a vision tower uses another implementation.
    """
    text = model.config.get_text_config()
    found = {
        id(module.config): module.config
        for module in model.modules()
        if _packs_sequences(module) and (module.config is not text or text is model.config)
    }
    for config in found.values():
        if config._attn_implementation != name:
            raise ValueError(
                f"{type(config).__name__} uses the implementation {config._attn_implementation!r}, "
                f"and not {name!r}"
            )
    packed = {known: _with_packed_name(config, name) for known, config in found.items()}
    for module in model.modules():
        own = packed.get(id(getattr(module, "config", None)))
        if own is not None:
            module.config = own
    return len(packed)


def _with_packed_name(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    own = copy.copy(config)
    own._attn_implementation_internal = PackedName(name)
    return own


def _packs_sequences(module: torch.nn.Module) -> bool:
    """Returns whether the layer gives the bounds of packed sequences to flash attention only."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or not hasattr(module, "config") or _ASKS not in code.co_names:
        return False
    keywords = {name for found in code.co_consts if isinstance(found, tuple) for name in found}
    return keywords >= _GIVES
