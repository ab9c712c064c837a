"""Flash first while registered. Torch's first choice of a backend is played here; tests/gpu has it
for real."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import CUDNN, CUDNN_FIRST, EFFICIENT, FLASH, MATH, OVERRIDEABLE
from processes import run
from torch.nn import attention

import fa4_ext
from fa4_ext import _environment, _sdpa_order

FLASH_FIRST = [FLASH, CUDNN, EFFICIENT, MATH, OVERRIDEABLE]
USERS = [EFFICIENT, MATH, FLASH, CUDNN, OVERRIDEABLE]


def order() -> list[int]:
    return torch._C._get_sdp_priority_order()


def test_order_is_untouched_until_cuda_is_up(cuda):
    before = order()
    with fa4_ext.register():
        assert order() == before
        cuda.start()
        assert order() == FLASH_FIRST
    assert order() == CUDNN_FIRST


def test_registering_with_cuda_up_takes_effect_at_once(cuda):
    cuda.start()
    with fa4_ext.register():
        assert order() == FLASH_FIRST
    assert order() == CUDNN_FIRST


def test_only_one_call_waits_for_cuda(cuda):
    for _ in range(3):
        fa4_ext.register()
    assert len(cuda.queue) == 1


def test_a_driver_that_is_too_old_for_the_kernels_leaves_the_order_alone(cuda, monkeypatch):
    monkeypatch.setattr(_environment, "_driver", lambda: 12080)
    cuda.start()
    before = order()
    with fa4_ext.register():
        assert order() == before
    assert order() == before


def test_removed_before_cuda_comes_up_changes_nothing(cuda):
    before = order()
    fa4_ext.register().remove()
    cuda.start()
    assert order() == before and not cuda.chosen


def test_prefer_false_changes_nothing(cuda):
    cuda.start()
    cuda.choose()
    with fa4_ext.register(prefer=False):
        assert order() == CUDNN_FIRST


def test_users_change_while_registered_stays(cuda):
    cuda.start()
    handle = fa4_ext.register()
    torch._C._set_sdp_priority_order(USERS)
    assert order() == USERS
    handle.remove()
    assert order() == USERS


def test_a_user_s_order_between_two_registrations_comes_back_with_the_first_s(cuda):
    cuda.start()
    torch._C._set_sdp_priority_order(before := CUDNN_FIRST)
    cuda.chosen = True
    outer = fa4_ext.register()
    assert order() == FLASH_FIRST
    torch._C._set_sdp_priority_order(USERS)
    inner = fa4_ext.register()
    assert order()[0] == FLASH
    inner.remove()
    assert order() == USERS
    # The end of torch's own context manager puts it back like this.
    torch._C._set_sdp_priority_order(FLASH_FIRST)
    outer.remove()
    assert order() == before


def test_of_two_registrations_before_cuda_comes_up_either_may_be_removed_first(cuda):
    outer, inner = fa4_ext.register(), fa4_ext.register()
    cuda.start()
    assert order() == FLASH_FIRST
    inner.remove()
    assert order() == FLASH_FIRST
    inner = fa4_ext.register()
    outer.remove()
    assert order() == FLASH_FIRST
    inner.remove()
    assert order() == CUDNN_FIRST


def test_a_registration_that_ends_while_the_order_changes_does_not_deadlock(cuda, monkeypatch):
    """The garbage collector ends registrations of a generator that nobody finished."""
    cuda.up = True
    outer = fa4_ext.register()
    choose = _sdpa_order._make_first_choice
    monkeypatch.setattr(_sdpa_order, "_make_first_choice", lambda: (outer.remove(), choose()))
    torch._C._set_sdp_priority_order(USERS)
    with fa4_ext.register() as inner:
        assert not outer.active and inner.active and order()[0] == FLASH
    assert order() == USERS


def test_users_order_of_before_comes_back(cuda):
    cuda.start()
    cuda.choose()
    torch._C._set_sdp_priority_order(USERS)
    with fa4_ext.register():
        assert order() == [FLASH, EFFICIENT, MATH, CUDNN, OVERRIDEABLE]
    assert order() == USERS


def test_users_change_survives_the_removal_of_an_older_handle(cuda):
    cuda.start()
    older, newer = fa4_ext.register(), fa4_ext.register()
    torch._C._set_sdp_priority_order(USERS)
    older.remove()
    assert order() == USERS
    newer.remove()
    assert order() == USERS


@pytest.mark.parametrize("older_first", [True, False])
def test_newest_live_handle_decides(cuda, older_first):
    cuda.start()
    preferring = fa4_ext.register()
    indifferent = fa4_ext.register(prefer=False)
    assert order() == CUDNN_FIRST
    first, second = (preferring, indifferent) if older_first else (indifferent, preferring)
    first.remove()
    assert order() == (CUDNN_FIRST if older_first else FLASH_FIRST)
    second.remove()
    assert order() == CUDNN_FIRST


def test_sdpa_kernel_with_priority_is_obeyed_and_undone(cuda):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cuda.start()
    with fa4_ext.register():
        with sdpa_kernel(
            [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True
        ):
            assert order()[:2] == [CUDNN, FLASH]
        assert order()[0] == FLASH


def test_enabled_flags_are_the_users(cuda):
    flags = ("flash", "mem_efficient", "math", "cudnn")
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        before = [getattr(torch.backends.cuda, f"{flag}_sdp_enabled")() for flag in flags]
        cuda.start()
        with fa4_ext.register():
            assert [
                getattr(torch.backends.cuda, f"{flag}_sdp_enabled")() for flag in flags
            ] == before
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


@pytest.mark.skipif(not hasattr(torch._C, "_set_sdp_use_fa4"), reason="torch 2.15 and later")
@pytest.mark.parametrize("on", [False, True])
def test_which_calls_are_eligible_for_flash_stays_torchs_business(cuda, on):
    """With the switch of torch's own FA4 on, head dims that no kernel of ours or of the stock has
    would come to flash attention."""
    before = torch._C._get_fa4_sdp_enabled()
    torch._C._set_sdp_use_fa4(on)
    try:
        cuda.start()
        with fa4_ext.register():
            assert torch._C._get_fa4_sdp_enabled() == on
        attention.activate_flash_attention_impl("FA4_EXT")
        assert torch._C._get_fa4_sdp_enabled() == on
        attention.restore_flash_attention_impl()
        assert torch._C._get_fa4_sdp_enabled() == on
    finally:
        torch._C._set_sdp_use_fa4(before)


def test_change_of_the_order_waits_in_torchs_own_queue():
    run("""
        import torch, fa4_ext
        from fa4_ext import _sdpa_order
        fa4_ext.register()
        assert not torch.cuda.is_initialized()
        assert [call for call, _ in torch.cuda._queued_calls].count(_sdpa_order._apply_queued) == 1
    """)


def test_first_choice_that_fails_does_not_fail_the_start_of_cuda():
    # The process sees no CUDA device to choose for.
    run("from fa4_ext import _sdpa_order; _sdpa_order._make_first_choice()")
