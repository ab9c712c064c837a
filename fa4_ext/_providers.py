"""This module puts the package into torch's registry of flash attention providers: by a name of its
own, and while a registration asks for it, by names that programs ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import attention

NAME = "FA4_EXT"
OTHERS = ("FA3", "FA4")  # the names of torch's own providers

_answers: list[_Answer] = []  # oldest first


class _Answer:
    """What the registry calls to activate a provider, while `owner` answers to its name."""

    def __init__(self, name: str, owner, activate: Callable[[], Any]):
        self.name = name
        self.owner = owner
        self.activate = activate
        self.before: Any = None  # what the registry called; None if it had no such name

    def __call__(self):
        if self in _answers:
            return self.activate()
        # Another provider remembered this answer while it was there, and has put it back.
        if self.before is None:
            raise ValueError(f"fa4_ext no longer provides {self.name!r}, and nothing else does")
        return self.before()


def offer(register: Callable[[], Any], usable: bool) -> str | None:
    """Lets torch.nn.attention.activate_flash_attention_impl("FA4_EXT") find this package. Returns a
    sentence for the warning if torch's registry refuses, or None.

    The registry asks providers not to activate themselves, so the import's own registration stays
    outside of it: a provider that is activated later goes on top of ours, and restoring brings ours
    back.
    """
    try:
        # a torch that is too old has no registry
        to_registry = getattr(attention, "register_flash_attention_impl", None)
        # A copy of this package that can't be used leaves the place to the one that can.
        if to_registry and (usable or NAME not in attention.list_flash_attention_impls()):
            to_registry(NAME, register_fn=register)
    except Exception as error:
        return (
            f"torch.nn.attention's registry does not take {NAME}: {error!r}. "
            "fa4_ext.register() does not need it."
        )
    return None


def check(provides) -> tuple[str, ...]:
    """Returns the names of an argument `provides`, each once.

    Raises:
        ValueError: it is something else than a tuple or a list of names that are allowed.
    """
    if isinstance(provides, (tuple, list)) and all(name in OTHERS for name in provides):
        return tuple(dict.fromkeys(provides))
    allowed = ", ".join(map(repr, OTHERS))
    raise ValueError(f"provides must be a tuple of names out of {allowed}, got {provides!r}")


def from_environment(value: str | None) -> tuple[tuple[str, ...], str | None]:
    """Returns the names in this value of FA4_EXT_PROVIDES, and the sentence about a value that is
    not allowed, or None."""
    names = [name for word in (value or "").split(",") if (name := word.strip().upper())]
    if all(name in OTHERS for name in names):
        return tuple(dict.fromkeys(names)), None
    return (), (
        f"FA4_EXT_PROVIDES must be names out of {', '.join(OTHERS)}, separated by commas, is "
        f"{value!r}: fa4_ext provides none of them."
    )


def problem() -> str | None:
    """Returns why this torch's registry cannot be changed and put back, or None."""
    if isinstance(_registry(), dict):
        return None
    return (
        f"torch {torch.__version__} has no torch.nn.attention._registry._FLASH_ATTENTION_IMPLS: "
        "fa4_ext can provide none of its names."
    )


def _registry() -> Any:
    # torch promises no way to read an entry, nor to take one out.
    return getattr(getattr(attention, "_registry", None), "_FLASH_ATTENTION_IMPLS", None)


def provide(names: tuple[str, ...], owner, activate: Callable[[], Any]) -> None:
    """Has the registry call `activate` for these names, until `withdraw` finds the owner gone."""
    for name in names:
        answer = _Answer(name, owner, activate)
        answer.before = _registry().get(name)
        # This comes first, so that the registry can be put back if this is interrupted.
        _answers.append(answer)
        _registry()[name] = answer


def withdraw(live: list) -> None:
    """Puts the registry back where an owner is not among the live ones. What somebody else has
    registered by the name since then stays. Doing so again completes what was interrupted."""
    for answer in list(_answers):
        if answer.owner in live:
            continue
        for later in list(_answers):
            if later.before is answer:
                later.before = answer.before
        if _registry().get(answer.name) is answer:
            _put_back(answer)
        # This comes last, so that an interruption leaves the rest to the next time. The garbage
        # collector may have ended another registration meanwhile, which did all of this.
        with contextlib.suppress(ValueError):
            _answers.remove(answer)


def _put_back(answer: _Answer) -> None:
    if answer.before is None:
        _registry().pop(answer.name, None)
    else:
        _registry()[answer.name] = answer.before
