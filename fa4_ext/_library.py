"""This module loads the native library and calls its C interface."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import re
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from fa4_ext import _dispatcher, _elf, _environment

PATH = Path(__file__).with_name("libfa4_ext.so")

# The dispatcher says this once a process, about the first operator that anyone overrides.
_OVERRIDE_WARNING = (
    r"(?s).*Overriding a previously registered kernel for the same operator and the same dispatch "
    r"key"
)
# as warnings.filterwarnings stores it
_FILTER = ("ignore", re.compile(_OVERRIDE_WARNING, re.IGNORECASE), UserWarning, None, 0)

# Keeps the kernels of past registrations in memory, because another thread may be about to run one
# that was just removed. It would have to sleep right there while this many more come and go, which
# takes 50 us each.
_kept: collections.deque = collections.deque(maxlen=1000)


def _load() -> ctypes.CDLL:
    _elf.check_whole(PATH)
    library = ctypes.CDLL(str(PATH))
    library.fa4_ext_register.argtypes = ()
    library.fa4_ext_register.restype = ctypes.c_int
    library.fa4_ext_set_option.argtypes = (ctypes.c_char_p, ctypes.c_int)
    library.fa4_ext_set_option.restype = ctypes.c_int
    library.fa4_ext_disable_kernels.argtypes = (ctypes.c_char_p,)
    library.fa4_ext_disable_kernels.restype = ctypes.c_int
    library.fa4_ext_override.argtypes = (ctypes.c_int,) * 5
    library.fa4_ext_override.restype = None
    library.fa4_ext_remove.argtypes = ()
    library.fa4_ext_remove.restype = None
    for text in (
        library.fa4_ext_problem,
        library.fa4_ext_last_error,
        library.fa4_ext_build_info,
        library.fa4_ext_manifest,
    ):
        text.argtypes = ()
        text.restype = ctypes.c_char_p
    return library


def _try_to_load() -> tuple[ctypes.CDLL | None, str | None]:
    """Returns the library and None, or None and the reason why it cannot be used, so that a program
    that can do without these kernels goes on without them.

    Raises:
        ImportError: the library's file is missing.
    """
    if (
        problem := _environment.torch_too_old(str(torch.__version__))
        or _environment.torch_unknown()
    ):
        return None, problem
    if not PATH.exists():
        raise ImportError(
            f"fa4_ext's native library is missing, {PATH}: `make build` builds it in a checkout; "
            "an installed fa4_ext is "
            "imported from other folders"
        )
    try:
        library = _load()
        if refusal := library.fa4_ext_problem():
            return (
                None,
                "fa4_ext's native library refuses to be used in this process. "
                f"{refusal.decode(errors='replace')}",
            )
        return library, None
    # AttributeError: a library of another version lacks a function
    except (OSError, AttributeError) as error:
        return None, (
            f"fa4_ext's native library could not be loaded beside torch {torch.__version__}: "
            f"{error}. Until fa4_ext is installed "
            "anew, or in a checkout built anew by `make build`, every call runs PyTorch's own "
            "kernels."
        )


_native, problem = _try_to_load()  # problem: why the library can't be used in this process, or None


def native() -> ctypes.CDLL:
    """Returns the loaded library.

    Raises:
        RuntimeError: it could not be loaded.
    """
    if _native is None:
        raise RuntimeError(problem)
    return _native


def _last_error() -> str:
    return native().fa4_ext_last_error().decode(errors="replace")  # a long text is cut off


class _WithPythonWarnings:
    """Calls a function from inside one of torch's own functions. There torch turns C++ warnings
    into Python warnings, which can be filtered, instead of printing them on stderr."""

    def __init__(self, function):
        self.function = function
        self.result = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        (call,) = args
        call.result = call.function()


def register() -> None:
    """Puts our overrides on top of the dispatcher's kernels, or moves them back to the top. Leaves
    the dispatcher alone if they are on top already.

    Raises:
        RuntimeError: the dispatcher refused them.
    """
    if _dispatcher.is_all_ours():
        return
    call = _WithPythonWarnings(native().fa4_ext_register)
    try:
        # Not warnings.catch_warnings: leaving it would undo what other threads did to the filters
        # meanwhile.
        warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
        with contextlib.suppress(TypeError):
            torch.abs(call)
        # __torch_function__ was bypassed: PyTorch's warning may reach stderr
        if call.result is None:
            call.result = call.function()
    finally:
        put_warnings_back()
    if call.result != 0:
        raise RuntimeError(_last_error())
    _kept.append(_dispatcher.kernels())


def put_warnings_back() -> None:
    """Removes our filter of warnings, if it is there."""
    while _FILTER in warnings.filters:
        with contextlib.suppress(ValueError):  # another thread restored an old list
            warnings.filters.remove(_FILTER)  # type: ignore[attr-defined]


def set_option(name: str, value: bool) -> None:
    """Sets an option of our overrides, "strict", "speed_rules" or "prefer", from the next call on.

    Raises:
        RuntimeError: there is no such option.
    """
    if native().fa4_ext_set_option(name.encode(), value) != 0:
        raise RuntimeError(_last_error())


_disabled: tuple[str, ...] = ()


def disable(patterns: tuple[str, ...]) -> None:
    """Leaves out the kernels that match one of these patterns, and no others, from the next call
    on.

    Raises:
        RuntimeError: a pattern matches no kernel; nothing has changed then.
    """
    global _disabled
    if native().fa4_ext_disable_kernels(" ".join(patterns).encode()) != 0:
        raise RuntimeError(_last_error())
    _disabled = tuple(patterns)


def disabled_kernels() -> tuple[str, ...]:
    """Returns the patterns of the kernels that are left out."""
    return _disabled


class Overrides(typing.NamedTuple):
    """Decisions that measurements and tests take in the planner's place. A zero leaves the decision
    to the planner."""

    tile: tuple[int, int] = (0, 0)  # only kernels with this tile run, of queries and of keys
    # CTAs, and under a causal mask paired heads, of a dense forward without a window on Hopper
    schedule: tuple[int, int] = (0, 0)
    # few queries run on the decode kernel wherever it can (1), or only where the other can't (-1)
    decode: int = 0


_overrides = Overrides()


@contextlib.contextmanager
def override(**changed) -> Iterator[None]:
    """Lets measurements and tests change some of the overrides inside a `with` block, for all
    threads."""
    before = _overrides
    _put_overrides(before._replace(**changed))
    try:
        yield
    finally:
        _put_overrides(before)


def _put_overrides(overrides: Overrides) -> None:
    global _overrides
    native().fa4_ext_override(*overrides.tile, *overrides.schedule, overrides.decode)
    _overrides = overrides


def remove() -> None:
    """Takes our overrides out of the dispatcher, if they are there."""
    native().fa4_ext_remove()


def build_info() -> dict:
    return json.loads(native().fa4_ext_build_info())


def manifest() -> list[dict]:
    return json.loads(native().fa4_ext_manifest())
