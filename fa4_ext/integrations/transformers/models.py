"""This module finds out how the models of a configuration call attention."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from transformers import PreTrainedModel


@torch.compiler.assume_constant_result
def refuse_own_attention(config_class: type) -> None:
    """Raises the error for a model that computes attention by itself.

    transformers gives any registered name to such a model, which then adds the boolean mask to its
    scores.

    Raises:
        ValueError: a model of this configuration does not use transformers' interface.
    """
    for model in _models(config_class):
        if not model._can_set_attn_implementation():
            raise ValueError(
                f"{model.__name__} does not call attention through transformers' interface: load "
                'it with attn_implementation="eager" or "sdpa"'
            )


@torch.compiler.assume_constant_result
def supports_sdpa(config_class: type) -> bool:
    """Returns whether transformers runs the models of this configuration with its sdpa, too."""
    return any(model._supports_sdpa for model in _models(config_class))


@torch.compiler.assume_constant_result
def adds_masks(config_class: type) -> bool:
    """Returns whether the models of this configuration have no attention but their own eager one,
    so that their code may rely on a mask that is added to the scores.
    """
    return bool(_models(config_class)) and not supports_sdpa(config_class)


@functools.cache
def _models(config_class: Any) -> tuple[type[PreTrainedModel], ...]:
    """Returns the models in the modeling file that belongs to the configuration's, if any."""
    own = config_class.__module__
    name = own.replace("configuration_", "modeling_")
    defined = vars(sys.modules[name]).values() if name != own and name in sys.modules else ()
    return tuple(
        found
        for found in defined
        if inspect.isclass(found)
        and issubclass(found, PreTrainedModel)
        and found.__module__ == name
    )
