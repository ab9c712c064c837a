"""This module registers integrations when a program imports their clients, for FA4_EXT_AUTOLOAD.

It imports no client itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def arm() -> None:
    """Lets transformers have `attn_implementation="fa4_ext"` from when its models are imported."""
    when_imported("transformers.modeling_utils", _register_with_transformers)


def when_imported(name: str, act: Callable[[], object]) -> None:
    """Calls `act` after a module has been imported for the first time, or now if it has been. If
    that import has begun already, `act` is called when the next other module is looked for. What it
    raises becomes a RuntimeWarning, because the import must not fail."""
    if _is_imported(name):
        _carefully(name, act)
    else:
        sys.meta_path.insert(0, _Finder(name, act))


def _is_imported(name: str) -> bool:
    """Returns whether a module has been imported, to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _register_with_transformers() -> None:
    from fa4_ext.integrations import transformers

    transformers.register()


def _carefully(name: str, act: Callable[[], object]) -> None:
    try:
        act()
    except Exception as error:
        client = name.partition(".")[0]
        with contextlib.suppress(Exception):  # where warnings are errors
            warnings.warn(
                f"fa4_ext could not register with {client}, which goes on without it: {error!r}",
                RuntimeWarning,
                stacklevel=2,
            )


class _Finder(MetaPathFinder):
    """Finds one module once, by the finders behind it, and sees when it is there without that."""

    def __init__(self, name: str, act: Callable[[], object]):
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name and not _is_imported(self.name):
            return None
        with contextlib.suppress(ValueError):  # another thread took it out
            sys.meta_path.remove(self)
        if fullname != self.name:
            _carefully(self.name, self.act)
            return None
        spec = importlib.util.find_spec(fullname)
        if spec and spec.loader:
            spec.loader = _Loader(spec.loader, self.act)
        return spec


class _Loader(Loader):
    """Acts after the module's own loader, and leaves that one in the module."""

    def __init__(self, loader: Loader, act: Callable[[], object]):
        self.loader, self.act = loader, act

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _carefully(module.__name__, self.act)
