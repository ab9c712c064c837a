"""The names that torch's registry of providers answers with these kernels: `provides` and
FA4_EXT_PROVIDES."""

from __future__ import annotations

from itertools import permutations

import pytest
from processes import run
from test_registration import PythonOverride, dispatcher, on_top
from torch.nn import attention

import fa4_ext
from fa4_ext import _library, _providers, _register

pytestmark = pytest.mark.usefixtures("unregistered")

NAMES = ("FA3", "FA4")


def registry() -> dict:
    return dict(attention._registry._FLASH_ATTENTION_IMPLS)


def owner(name: str):
    """Returns the handle that answers to a name, or what else the registry calls."""
    function = registry().get(name)
    return function.owner if isinstance(function, _providers._Answer) else function


def test_it_is_off_by_default():
    before = registry()
    with fa4_ext.register() as handle:
        assert handle.provides == () and registry() == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("provides", [NAMES, list(NAMES), ("FA4", "FA3", "FA4")], ids=str)
def test_activating_by_a_provided_name_puts_ours_on_top(name, provides):
    before = dispatcher()
    with fa4_ext.register(provides=provides) as handle:
        assert set(handle.provides) == set(NAMES) and len(handle.provides) == 2
        assert attention.current_flash_attention_impl() is None
        other = PythonOverride()
        assert on_top() == "other"
        attention.activate_flash_attention_impl(name)
        assert attention.current_flash_attention_impl() == name and on_top() == "ours"
        assert len(_register._live) == 2
        attention.restore_flash_attention_impl()
        assert attention.current_flash_attention_impl() is None
        assert _register._live == [handle]
        other.remove()
    assert dispatcher() == before


def test_a_name_that_is_not_provided_stays_torchs():
    before = registry()
    with fa4_ext.register(provides=("FA3",)) as handle:
        assert owner("FA3") is handle
        assert registry() | {"FA3": before["FA3"]} == before


def test_activating_keeps_the_options_of_the_handle_that_provides(native_calls):
    options = {"fallback": "error", "prefer": False, "speed_rules": False}
    with fa4_ext.register(**options, provides=("FA3",)), fa4_ext.register():
        attention.activate_flash_attention_impl("FA3")
        activated = _register.options_in_force()
        assert {name: getattr(activated, name) for name in options} == options
        assert activated.provides == ()
        assert native_calls[-2] == ("prefer", False) and native_calls[-1] == "register"
        attention.restore_flash_attention_impl()


def test_changing_from_one_provided_name_to_another_leaves_one_handle():
    with fa4_ext.register(provides=NAMES) as handle:
        for name in ("FA3", "FA4", "FA4", "FA4_EXT", "FA3"):
            attention.activate_flash_attention_impl(name)
            assert attention.current_flash_attention_impl() == name
            assert len(_register._live) == 2, name
        attention.restore_flash_attention_impl()
        assert _register._live == [handle]


def test_what_is_activated_stays_when_the_name_is_given_back():
    before = registry()
    handle = fa4_ext.register(provides=("FA3",))
    attention.activate_flash_attention_impl("FA3")
    handle.remove()
    assert registry() == before and on_top() == "ours"
    attention.restore_flash_attention_impl()
    assert on_top() is None and _register._live == []


def test_an_activation_that_fails_leaves_no_handle_and_no_active_provider(monkeypatch):
    def refuse():
        raise RuntimeError("the dispatcher says no")

    with fa4_ext.register(provides=("FA3",)) as handle:
        with monkeypatch.context() as patch:
            patch.setattr(_library, "register", refuse)
            with pytest.raises(RuntimeError, match="the dispatcher says no"):
                attention.activate_flash_attention_impl("FA3")
        assert attention.current_flash_attention_impl() is None
        assert _register._live == [handle]


def test_a_registration_that_fails_provides_nothing(monkeypatch):
    def refuse():
        raise RuntimeError("the dispatcher says no")

    before = registry()
    monkeypatch.setattr(_library, "register", refuse)
    with pytest.raises(RuntimeError, match="the dispatcher says no"):
        fa4_ext.register(provides=NAMES)
    assert registry() == before and _providers._answers == []


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_three_handles_in_every_order_of_removal(order):
    before = registry()
    handles = [fa4_ext.register(provides=provides) for provides in (NAMES, ("FA4",), NAMES)]
    for index in order:
        handles[index].remove()
        live = [handle for handle in handles if handle.active]
        for name in NAMES:
            providing = [handle for handle in live if name in handle.provides]
            assert owner(name) is (providing[-1] if providing else before[name]), (name, live)
    assert registry() == before and list(registry()) == list(before)
    assert _providers._answers == []


@pytest.mark.parametrize("order", list(permutations(range(2))), ids=str)
def test_a_provider_that_took_the_name_between_two_of_ours_gets_it_back(order, monkeypatch):
    monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, "FA3", registry()["FA3"])
    handles = [fa4_ext.register(provides=("FA3",))]
    attention.register_flash_attention_impl("FA3", register_fn=PythonOverride)
    handles.append(fa4_ext.register(provides=("FA3",)))
    for index in order:
        handles[index].remove()
        assert owner("FA3") is (handles[1] if handles[1].active else PythonOverride)
    assert _providers._answers == []


def test_a_provider_that_took_the_name_meanwhile_keeps_it(monkeypatch):
    monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, "FA4", registry()["FA4"])
    handle = fa4_ext.register(provides=("FA4",))
    attention.register_flash_attention_impl("FA4", register_fn=PythonOverride)
    attention.activate_flash_attention_impl("FA4")
    assert on_top() == "other"
    attention.restore_flash_attention_impl()
    handle.remove()
    assert owner("FA4") is PythonOverride


def test_a_provider_that_puts_ours_back_after_its_end_gets_what_was_there_before(monkeypatch):
    entries = attention._registry._FLASH_ATTENTION_IMPLS
    monkeypatch.setitem(entries, "FA3", PythonOverride)
    handle = fa4_ext.register(provides=("FA3",))
    remembered = entries["FA3"]
    attention.register_flash_attention_impl("FA3", register_fn=lambda: None)
    handle.remove()
    attention.register_flash_attention_impl("FA3", register_fn=remembered)
    attention.activate_flash_attention_impl("FA3")
    assert on_top() == "other" and _register._live == []
    attention.restore_flash_attention_impl()


def test_a_name_that_the_registry_did_not_have_goes_again(monkeypatch):
    entries = attention._registry._FLASH_ATTENTION_IMPLS
    monkeypatch.delitem(entries, "FA3")
    with fa4_ext.register(provides=("FA3",)):
        remembered = entries["FA3"]
        assert "FA3" in attention.list_flash_attention_impls()
    assert "FA3" not in attention.list_flash_attention_impls()
    with pytest.raises(ValueError, match="fa4_ext no longer provides 'FA3'"):
        remembered()


@pytest.mark.parametrize(
    "provides", ["FA3", ("FA2",), ("FA3", "fa4"), ("FA4_EXT",), None, True, (3,), {"FA3"}], ids=str
)
def test_a_wrong_argument_is_named_with_its_value_and_what_is_allowed(provides):
    before = registry()
    with pytest.raises(ValueError) as error:
        fa4_ext.register(provides=provides)
    expected = f"provides must be a tuple of names out of 'FA3', 'FA4', got {provides!r}"
    assert str(error.value) == expected
    assert registry() == before and _register._live == []


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, ()),
        ("", ()),
        (" , ", ()),
        ("FA3", ("FA3",)),
        ("FA4,FA3", ("FA4", "FA3")),
        (" fa3 , Fa4,fa3,", ("FA3", "FA4")),
    ],
)
def test_the_setting_is_names_between_commas(value, names):
    assert _providers.from_environment(value) == (names, None)


@pytest.mark.parametrize("value", ["FA2", "FA3;FA4", "FA3 FA4", "FA3,1", "FA4_EXT"])
def test_a_setting_that_is_not_allowed_is_named_and_provides_nothing(value):
    names, sentence = _providers.from_environment(value)
    assert names == ()
    expected = ("FA4_EXT_PROVIDES", "FA3, FA4", repr(value), "provides none")
    assert all(word in sentence for word in expected), sentence


# What follows runs in processes of their own, as their import finds the setting.

IMPORT = """
import torch
from torch.nn import attention
entries = attention._registry._FLASH_ATTENTION_IMPLS
before = dict(entries)
import fa4_ext
def ours():
    return "registered at fa4_ext:" in torch._C._dispatch_dump("aten::_flash_attention_forward")
"""


def test_the_import_provides_what_the_setting_says_until_its_handle_is_removed():
    run(
        IMPORT
        + """
assert fa4_ext.default_handle.provides == ("FA3", "FA4")
fa4_ext.default_handle.remove()
del entries["FA4_EXT"]
assert entries == before and not ours()
with fa4_ext.register(provides=("FA3",)):
    attention.activate_flash_attention_impl("FA3")
attention.restore_flash_attention_impl()
assert not ours() and not torch.cuda.is_initialized()
""",
        FA4_EXT_PROVIDES="FA3,FA4",
    )


def test_an_import_that_does_not_register_provides_nothing():
    code = IMPORT + "del entries['FA4_EXT']\nassert entries == before and not ours()\n"
    assert run(code, FA4_EXT_PROVIDES="FA3", FA4_EXT_AUTOREGISTER="0").stderr == ""


def test_a_setting_that_is_not_allowed_warns_and_registers():
    code = IMPORT + "assert fa4_ext.default_handle.provides == () and ours()\n"
    said = run(code, FA4_EXT_PROVIDES="FA3,FA5").stderr
    assert "<string>:6: RuntimeWarning: FA4_EXT_PROVIDES must be names out of FA3, FA4" in said
    assert "is 'FA3,FA5'" in said
