"""Ctrl-C inside register() and remove(): register() leaves nothing behind, and a second remove()
does the rest."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_registration import OPS, PythonOverride, on_top
from torch.nn import attention

import fa4_ext
from fa4_ext import _dispatcher, _library, _providers, _register

pytestmark = pytest.mark.usefixtures("unregistered")
PACKAGE = str(Path(fa4_ext.__file__).parent)
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def interrupted(call: Callable, line: int) -> bool:
    """Calls, and raises KeyboardInterrupt before the given line of the package's that runs. Returns
    False where it ran to its end first."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    # It may be a debugger's, or that of a measurement of coverage.
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def dispatcher() -> list[str]:
    return [torch._C._dispatch_dump(op) for op in OPS]


def is_strict() -> bool:
    """Returns which options are in force, by whether a call that none of our kernels runs raises
    our error."""
    query = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16)
    try:
        torch.ops.aten._scaled_dot_product_flash_attention.default.redispatch(
            CUDA, query, query, query
        )
    except RuntimeError as error:
        return "FA4" in str(error)
    return False


# The library's options, as this process has set them.
in_force: dict[str, int] = {}


@pytest.fixture(autouse=True)
def options_are_noted(monkeypatch, unregistered):
    native = _library.native()
    set_option = native.fa4_ext_set_option

    def noted(name: bytes, value: int) -> int:
        in_force[name.decode()] = value
        return set_option(name, value)

    monkeypatch.setattr(native, "fa4_ext_set_option", noted)
    monkeypatch.setattr(_register, "_in_force", None)


def registry() -> dict:
    return {
        name: "ours" if isinstance(function, _providers._Answer) else function
        for name, function in attention._registry._FLASH_ATTENTION_IMPLS.items()
    }


def state() -> dict:
    """Returns all that a registration may change."""
    return {
        "live": list(_register._live),
        "dispatcher": dispatcher(),
        "registry": registry(),
        "filters": list(warnings.filters),
        "strict": is_strict() if on_top() == "ours" else None,
        "options": dict(in_force) if on_top() == "ours" else None,
    }


def check(before: dict, line: int) -> None:
    now = state()
    wrong = {name: (before[name], now[name]) for name in before if now[name] != before[name]}
    assert not wrong, f"interrupted at line {line}: {wrong}"
    # No other thread finds a lock that is held for ever.
    thread = threading.Thread(target=lambda: fa4_ext.register().remove(), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive(), f"interrupted at line {line}: a lock is held"


# A call that runs fewer of them was not traced.
FEWEST_LINES = 15


STRICT = {"fallback": "error", "prefer": False, "speed_rules": False, "provides": ("FA3",)}
OUTERS = {
    "alone": [],
    "beside": [{}],
    "beside one that is strict": [{**STRICT, "provides": ("FA4", "FA3")}],
}


@pytest.mark.parametrize("outers", OUTERS.values(), ids=OUTERS)
@pytest.mark.parametrize("options", [{}, STRICT], ids=["default", "strict"])
def test_interrupted_register_leaves_nothing(outers, options):
    handles = [fa4_ext.register(**outer) for outer in outers]
    before, line = state(), 0
    while interrupted(lambda: fa4_ext.register(**options), line := line + 1):
        check(before, line)
    assert line > FEWEST_LINES
    _register._live[-1].remove()
    for handle in reversed(handles):
        handle.remove()
    assert on_top() is None


def test_interrupted_register_over_another_provider_leaves_what_its_own_end_ends():
    before = state()
    with fa4_ext.register():
        other = PythonOverride()
        live, line = list(_register._live), 0
        while interrupted(fa4_ext.register, line := line + 1):
            assert _register._live == live, f"interrupted at line {line}"
        _register._live[-1].remove()
    assert on_top() == "other"
    other.remove()
    check(before, line)


@pytest.mark.parametrize("first", [False, True], ids=["the newest", "the oldest"])
@pytest.mark.parametrize("outers", OUTERS.values(), ids=OUTERS)
@pytest.mark.parametrize("options", [{}, STRICT], ids=["default", "strict"])
def test_interrupted_remove_is_ended_by_a_second_one(outers, options, first):
    def handles() -> list[fa4_ext.Handle]:
        made = [fa4_ext.register(**each) for each in [*outers, options]]
        return made if first else made[::-1]

    bare = state()
    going, *staying = handles()
    going.remove()
    kept, line = {name: value for name, value in state().items() if name != "live"}, 0
    for handle in staying:
        handle.remove()
    check(bare, line)
    while True:
        going, *staying = handles()
        more = interrupted(going.remove, line := line + 1)
        going.remove()
        assert not going.active and _register._live == (staying if first else staying[::-1])
        check(kept, line)
        for handle in staying:
            handle.remove()
        check(bare, line)
        if not more:
            break
    assert line > FEWEST_LINES // 2


def test_interrupted_import_leaves_no_handle_but_its_own(monkeypatch):
    monkeypatch.setenv("FA4_EXT_PROVIDES", "FA4")
    monkeypatch.delenv("FA4_EXT_AUTOREGISTER", raising=False)
    before, line, more = state(), 0, True
    while more:
        monkeypatch.setattr(_register, "_imported", False)
        monkeypatch.setattr(_register, "default_handle", None)
        more = interrupted(_register.register_at_import, line := line + 1)
        assert _register._live in ([], [_register.default_handle]), f"interrupted at line {line}"
        # This stands for the next import.
        _register.register_at_import()
        assert _register._live == [_register.default_handle], f"interrupted at line {line}"
        _register.default_handle.remove()
        check(before, line)
    assert line > FEWEST_LINES


def test_a_body_that_is_interrupted_ends_the_registration():
    before = dispatcher()
    with pytest.raises(KeyboardInterrupt), fa4_ext.register():
        assert all(_dispatcher.is_ours(_dispatcher.entry(op)) for op in _dispatcher.OPS)
        raise KeyboardInterrupt
    assert dispatcher() == before or _register._live
