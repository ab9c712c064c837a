"""Checks handles: what the dispatcher holds before, while and after they live."""

from __future__ import annotations

import random
import threading
from itertools import permutations

import pytest
import torch
from processes import run
from torch.nn import attention

import fa4_ext
from fa4_ext import _library, _register

pytestmark = pytest.mark.usefixtures("unregistered")

OPS = (
    "aten::_flash_attention_forward",
    "aten::_flash_attention_backward",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_backward",
)


def dispatcher() -> list[str]:
    return [torch._C._dispatch_dump(op) for op in OPS]


def on_top(op: str = OPS[0]) -> str | None:
    """Returns who gets a CUDA tensor: "ours", "other" or None for PyTorch itself."""
    entries = [line for line in torch._C._dispatch_dump(op).splitlines() if line.startswith("CUDA")]
    if not entries or "RegisterCUDA" in entries[0]:
        return None
    return "ours" if "registered at fa4_ext:" in entries[0] else "other"


class PythonOverride:
    """Another provider, by torch.library, as torch's own FA3 and FA4 prototypes do it."""

    def __init__(self, ops: tuple[str, ...] = OPS):
        self.library = torch.library.Library("aten", "IMPL", "CUDA")
        for op in ops:
            self.library.impl(op.partition("::")[2], lambda *args, **kwargs: None, "CUDA")

    def remove(self):
        self.library._destroy()


def test_every_op_is_ours_while_registered_and_byte_identical_after():
    before = dispatcher()
    handle = fa4_ext.register()
    assert [on_top(op) for op in OPS] == ["ours"] * len(OPS)
    handle.remove()
    assert dispatcher() == before


def test_no_op_of_attention_is_touched_but_those_overridden():
    names = [
        name
        for name in torch._C._dispatch_get_all_op_names()
        if "attention" in name or "sdp" in name
    ]
    before = {name: torch._C._dispatch_dump(name) for name in names}
    with fa4_ext.register():
        during = {name: torch._C._dispatch_dump(name) for name in names}
    changed = {name for name in names if during[name] != before[name]}
    assert (
        changed == {name for name in names if "registered at fa4_ext:" in during[name]} >= set(OPS)
    )
    assert {name: torch._C._dispatch_dump(name) for name in names} == before


def test_torch_ops_inspection_shows_our_kernel_and_our_op():
    with fa4_ext.register():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            "aten::_flash_attention_forward", "CUDA"
        )
        assert "fa4_ext" in torch._C._dispatch_dump("aten::_flash_attention_forward")
    assert torch.ops.fa4_ext.explain.default._schema.name == "fa4_ext::explain"


def test_cpu_and_meta_kernels_are_untouched():
    with fa4_ext.register():
        query = torch.empty(1, 2, 8, 64, dtype=torch.bfloat16, device="meta")
        assert (
            torch.ops.aten._scaled_dot_product_flash_attention(query, query, query)[0].shape
            == query.shape
        )
        query = torch.randn(1, 2, 8, 64)
        assert (
            torch.nn.functional.scaled_dot_product_attention(query, query, query).isfinite().all()
        )


def test_strict_op_raises_the_reason():
    # CPU tensors would never get there on their own.
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    query = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16)
    with fa4_ext.register(fallback="error"):
        with pytest.raises(
            RuntimeError, match=r"FA4 .*flash_attention.* unsupported: inputs must be CUDA tensors"
        ):
            torch.ops.aten._scaled_dot_product_flash_attention.default.redispatch(
                cuda, query, query, query
            )
        with pytest.raises(
            RuntimeError, match=r"FA4 .*flash_attention.* unsupported: dropout_p must be 0"
        ):
            torch.ops.aten._scaled_dot_product_flash_attention.default.redispatch(
                cuda, query, query, query, 0.5
            )


def test_remove_twice_and_after_the_context_manager():
    with fa4_ext.register() as handle:
        assert handle.active and on_top() == "ours"
    assert not handle.active
    handle.remove()
    handle.remove()


def test_context_manager_removes_after_an_exception():
    with pytest.raises(KeyError), fa4_ext.register():
        raise KeyError
    assert on_top() is None


def test_dropping_a_handle_keeps_the_registration():
    fa4_ext.register()
    assert on_top() == "ours"


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_registered_until_the_last_of_three_handles_is_removed(order):
    before = dispatcher()
    handles = [fa4_ext.register(fallback=fallback) for fallback in ("stock", "error", "stock")]
    for count, index in enumerate(order, 1):
        handles[index].remove()
        assert on_top() == (None if count == 3 else "ours")
    assert dispatcher() == before


def test_newest_live_handles_options_are_in_force(native_calls):
    loose = fa4_ext.register()
    strict = fa4_ext.register(fallback="error", prefer=False, speed_rules=False)
    options = [("strict", True), ("speed_rules", False), ("prefer", False)]
    assert native_calls[-4:] == [*options, "register"]
    del native_calls[:]
    strict.remove()
    # It is not registered again, because a provider above ours stays above.
    assert native_calls == [(name, not value) for name, value in options]
    loose.remove()
    assert native_calls[-1] == "remove"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stict", 1, "there is no option stict; options are strict, speed_rules, prefer"),
        ("strict", 2, "option strict must be 0 or 1, is 2"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(name, value, message):
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        _library.set_option(name, value)


def test_an_override_ends_with_its_block_and_keeps_those_around_it():
    with _library.override(tile=(64, 128), decode=1):
        with pytest.raises(KeyError), _library.override(decode=-1):
            assert _library._overrides == _library.Overrides(tile=(64, 128), decode=-1)
            raise KeyError
        assert _library._overrides == _library.Overrides(tile=(64, 128), decode=1)
    assert _library._overrides == _library.Overrides()


def test_removing_an_older_handle_leaves_the_dispatcher_alone(native_calls):
    older, newer = fa4_ext.register(), fa4_ext.register(fallback="error")
    del native_calls[:]
    older.remove()
    assert native_calls == []
    newer.remove()


def test_refused_registration_raises_and_leaves_no_handle(monkeypatch):
    class Refusing:
        fa4_ext_register = staticmethod(lambda: 1)
        fa4_ext_last_error = staticmethod(lambda: b"the dispatcher says no")
        fa4_ext_set_option = staticmethod(lambda name, value: 0)
        fa4_ext_disable_kernels = staticmethod(lambda patterns: 0)
        fa4_ext_remove = staticmethod(lambda: None)

    with monkeypatch.context() as patch:
        patch.setattr(_library, "_native", Refusing)
        with pytest.raises(RuntimeError, match="the dispatcher says no"):
            fa4_ext.register()
    assert _register.options_in_force() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fallback": "cudnn"}, r"fallback must be one of 'stock', 'error', got 'cudnn'"),
        ({"fallback": None}, r"fallback must be one of 'stock', 'error', got None"),
        ({"prefer": "yes"}, r"prefer must be one of True, False, got 'yes'"),
        ({"prefer": None}, r"prefer must be one of True, False, got None"),
        ({"speed_rules": 2}, r"speed_rules must be one of True, False, got 2"),
    ],
)
def test_invalid_argument_is_named_with_its_value_and_the_allowed_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        fa4_ext.register(**arguments)
    assert on_top() is None


def remove_both(ours, other, ours_goes_first: bool) -> None:
    """Removes both. Whoever stays is on top, in either order, and nobody in the end."""
    if ours_goes_first:
        ours.remove()
        assert on_top() == "other"
        other.remove()
    else:
        other.remove()
        assert on_top() == "ours"
        ours.remove()
    assert on_top() is None


@pytest.mark.parametrize("ours_goes_first", [True, False])
def test_registered_above_another_provider(ours_goes_first):
    other = PythonOverride()
    ours = fa4_ext.register()
    assert on_top() == "ours"
    remove_both(ours, other, ours_goes_first)


@pytest.mark.parametrize("ours_goes_first", [True, False])
def test_registered_below_another_provider(ours_goes_first):
    ours = fa4_ext.register()
    other = PythonOverride()
    assert on_top() == "other"
    remove_both(ours, other, ours_goes_first)


def test_registering_again_goes_on_top_of_another_provider():
    first = fa4_ext.register()
    other = PythonOverride()
    second = fa4_ext.register()
    assert on_top() == "ours"
    second.remove()
    first.remove()
    assert on_top() == "other"
    other.remove()


def test_torchs_registry_activates_and_restores_ours():
    assert "FA4_EXT" in attention.list_flash_attention_impls()
    attention.activate_flash_attention_impl("FA4_EXT")
    assert attention.current_flash_attention_impl() == "FA4_EXT" and on_top() == "ours"
    attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None and on_top() is None


def test_our_registration_is_not_the_registrys_active_provider():
    with fa4_ext.register():
        assert attention.current_flash_attention_impl() is None


def test_provider_activated_over_ours_gives_way_to_ours_when_restored(monkeypatch):
    monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, "OTHER", PythonOverride)
    with fa4_ext.register():
        attention.activate_flash_attention_impl("OTHER")
        assert on_top() == "other"
        attention.activate_flash_attention_impl("FA4_EXT")
        assert on_top() == "ours"
        attention.activate_flash_attention_impl("OTHER")
        attention.restore_flash_attention_impl()
        assert on_top() == "ours"


def test_threads_that_register_and_remove_leave_nothing_behind():
    before, failures = dispatcher(), []

    def work(seed: int):
        choose, handles = random.Random(seed), []
        try:
            for _ in range(40):
                if handles and choose.random() < 0.5:
                    handles.pop(choose.randrange(len(handles))).remove()
                else:
                    handles.append(
                        fa4_ext.register(choose.choice(("stock", "error")), choose.random() < 0.5)
                    )
                if handles and on_top() != "ours":
                    failures.append("not registered while a handle lives")
            for handle in handles:
                handle.remove()
        except Exception as error:
            # A thread's own exception would not fail the test.
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert dispatcher() == before


def test_registers_where_torch_functions_are_off_or_a_mode_keeps_them_to_itself():
    run("""
        import torch
        from torch.overrides import TorchFunctionMode

        class Silent(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                return None

        with torch._C.DisableTorchFunctionSubclass():
            import fa4_ext
        assert fa4_ext.default_handle.active
        disabled = (torch._C.DisableTorchFunctionSubclass, torch._C.DisableTorchFunction)
        for context in (*disabled, Silent):
            with context():
                fa4_ext.register()
    """)


def test_a_registration_that_ends_while_another_begins_leaves_that_one_s_overrides(monkeypatch):
    old = fa4_ext.register()
    register = _library.register
    monkeypatch.setattr(_library, "register", lambda: (register(), old.remove()))
    with fa4_ext.register() as new:
        assert not old.active and new.active
        assert on_top() == "ours"


def test_a_registration_that_fails_is_not_live(monkeypatch):
    def fail():
        raise RuntimeError("the dispatcher says no")

    monkeypatch.setattr(_library, "register", fail)
    live = list(_register._live)
    with pytest.raises(RuntimeError, match="the dispatcher says no"):
        fa4_ext.register(fallback="error")
    assert _register._live == live


@pytest.mark.parametrize("prefer", [True, False])
def test_the_order_of_the_backends_and_their_switches_stay(prefer):
    def torchs_choices():
        flags = ("flash", "mem_efficient", "math", "cudnn")
        enabled = [getattr(torch.backends.cuda, f"{flag}_sdp_enabled")() for flag in flags]
        return torch._C._get_sdp_priority_order(), enabled, len(torch.cuda._queued_calls)

    before = torchs_choices()
    with fa4_ext.register(prefer=prefer) as handle:
        assert handle.prefer is prefer and torchs_choices() == before
    assert torchs_choices() == before


@pytest.mark.skipif(not hasattr(torch._C, "_set_sdp_use_fa4"), reason="torch 2.15 and later")
@pytest.mark.parametrize("on", [False, True])
def test_which_calls_are_eligible_for_flash_stays_torchs_business(on):
    """With the switch of torch's own FA4 on, head dims that no kernel of ours or of the stock has
    would come to flash attention."""
    before = torch._C._get_fa4_sdp_enabled()
    torch._C._set_sdp_use_fa4(on)
    try:
        with fa4_ext.register(provides=("FA4",)):
            for name in ("FA4_EXT", "FA4"):
                attention.activate_flash_attention_impl(name)
                assert torch._C._get_fa4_sdp_enabled() == on, name
                attention.restore_flash_attention_impl()
                assert torch._C._get_fa4_sdp_enabled() == on, name
    finally:
        torch._C._set_sdp_use_fa4(before)
