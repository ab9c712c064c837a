"""Registers and removes while other threads call: what docs and docstrings call safe changes
nothing under the calls."""

from __future__ import annotations

import pytest
import torch
from processes import python
from test_registration import OPS, PythonOverride, on_top

import fa4_ext
from fa4_ext import _library, _register


@pytest.fixture(autouse=True)
def unregistered():
    for handle in list(_register._live):
        handle.remove()
    yield
    for handle in list(_register._live):
        handle.remove()
    assert on_top() is None


@pytest.fixture
def changes(monkeypatch):
    """Returns the calls that change the dispatcher."""
    calls = []
    native = _library.native()

    class Counting:
        def __getattr__(self, name):
            if name in ("fa4_ext_register", "fa4_ext_remove"):
                calls.append(name.removeprefix("fa4_ext_"))
            return getattr(native, name)

    monkeypatch.setattr(_library, "_native", Counting())
    return calls


def test_registering_what_is_on_top_leaves_the_dispatcher_alone(changes):
    outer = fa4_ext.register()
    assert changes == ["register"]
    with fa4_ext.register(fallback="error"), fa4_ext.register():
        assert changes == ["register"]
    assert changes == ["register"]
    outer.remove()
    assert changes == ["register", "remove"]


@pytest.mark.parametrize("ops", [OPS, OPS[:1], OPS[-1:]], ids=["all", "the first", "the last"])
def test_registering_below_another_provider_goes_on_top_again(changes, ops):
    outer = fa4_ext.register()
    other = PythonOverride(ops)
    inner = fa4_ext.register()
    assert changes == ["register", "register"]
    assert [on_top(op) for op in OPS] == ["ours"] * len(OPS)
    inner.remove()
    outer.remove()
    assert [on_top(op) for op in ops] == ["other"] * len(ops)
    other.remove()


CALLS = """
import ctypes, sys, threading, time, torch, fa4_ext
how, count = sys.argv[1], int(sys.argv[2])
# CPU tensors would never get there on their own.
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
query = torch.zeros(1, 16, 8, 64, dtype=torch.bfloat16)
op = torch.ops.aten._scaled_dot_product_flash_attention.default
over, calls, wrong = False, [0, 0], []

def call(thread):
    while not over:
        try:
            op.redispatch(cuda, query, query, query)
        except RuntimeError as error:
            if "unsupported: inputs must be CUDA tensors" not in str(error):
                wrong.append(error)
        calls[thread] += 1

with fa4_ext.register(fallback="error"):
    library = ctypes.CDLL(fa4_ext._library.PATH)
    threads = [threading.Thread(target=call, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    # On a busy machine the threads get their turns late.
    registrations, end = 0, time.monotonic() + 100
    while registrations < count or (min(calls) <= 100 and time.monotonic() < end):
        registrations += 1
        if how == "python":
            fa4_ext.register(fallback="error").remove()
        else:
            assert library.fa4_ext_register() == 0
    over = True
    for thread in threads:
        thread.join()
assert not wrong, wrong[0]
assert min(calls) > 100, calls
"""


@pytest.mark.parametrize(("how", "count"), [("python", 3_000), ("c", 30_000)])
def test_registering_beside_two_calling_threads(how, count):
    """The old kernels' memory went back while a call was about to run them: it crashed within 1,000
    to 30,000 registrations."""
    done = python("-c", CALLS, how, str(count))
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"


@pytest.mark.skipif(
    not hasattr(torch.library, "get_kernel"), reason="this torch gives nobody its kernels to keep"
)
def test_what_a_call_may_be_about_to_run_outlives_its_registration():
    """Removing the last handle beside calls is not safe, but the usual way for it to crash is
    gone."""
    before = len(_library._kept)
    fa4_ext.register().remove()
    kernels = _library._kept[-1]
    assert len(_library._kept) == min(before + 1, _library._kept.maxlen)
    assert len(kernels) >= len(OPS) and all(
        isinstance(kernel, torch._C._SafeKernelFunction) for kernel in kernels
    )


def test_memory_of_past_registrations_is_bounded():
    assert _library._kept.maxlen == 1000
