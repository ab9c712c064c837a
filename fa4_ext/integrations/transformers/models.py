"""This module finds out how the models of a configuration call attention."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

Models = tuple[type[PreTrainedModel], ...]

_known: dict[type, Models] = {}


@torch.compiler.assume_constant_result
def refuse_own_attention(config_class: type) -> None:
    """Raises the error for a model that computes attention by itself.

    transformers gives any registered name to such a model, which then adds the boolean mask to its
    scores.

    Raises:
        ValueError: a model of this configuration does not use transformers' interface.
    """
    for model in _models(config_class):
        if not _uses_interface(model):
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


def _uses_interface(model: type[PreTrainedModel]) -> bool:
    """Returns whether the model's code looks attention functions up: in the way that transformers
    searches its file for, or in another way by transformers' table of them."""
    module = sys.modules.get(model.__module__)
    return model._can_set_attn_implementation() or hasattr(module, "ALL_ATTENTION_FUNCTIONS")


def _models(config_class: type) -> Models:
    """Returns the models of this configuration; or else those of the nearest class that it derives
    from; or none."""
    for parent in config_class.__mro__:
        if issubclass(parent, PreTrainedConfig) and parent is not PreTrainedConfig:
            found = _models_of(parent)
            if found:
                return found
    return ()


def _models_of(config_class: type) -> Models:
    """Returns the models of exactly this configuration. It is asked again while there are none,
    since their file may be imported later."""
    if config_class not in _known:
        found = _in_its_modeling_file(config_class) or tuple(
            model for model in _subclasses(PreTrainedModel) if model.config_class is config_class
        )
        if not found:
            return ()
        _known[config_class] = found
    return _known[config_class]


def _in_its_modeling_file(config_class: type) -> Models:
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


def _subclasses(parent: type[PreTrainedModel]) -> Iterator[type[PreTrainedModel]]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)
