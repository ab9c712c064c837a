"""Checks that the functions behind a kernel's range in a profile do in this torch what
csrc/aten/profile_range.cpp takes them for."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from torch.profiler import ProfilerActivity, profile


@pytest.fixture(scope="module")
def shim() -> ctypes.CDLL:
    library = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    library.aoti_record_function_start.argtypes = [
        ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64,
        ctypes.POINTER(ctypes.c_void_p),
    ]  # fmt: skip
    library.aoti_record_function_end.argtypes = [ctypes.c_void_p]
    return library


def record(shim: ctypes.CDLL, name: bytes, work=lambda: None) -> None:
    """Records as ProfileRange does: without keywords and inputs."""
    handle = ctypes.c_void_p()
    assert (
        shim.aoti_record_function_start(name, None, None, 0, ctypes.byref(handle)) == 0
        and handle.value
    )
    work()
    assert shim.aoti_record_function_end(handle) == 0


def test_a_range_is_an_event_of_that_name_around_what_ran_in_it(shim):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        record(shim, b"sm90_forward", lambda: torch.ones(3).sum())
    events = {event.name: event for event in profiler.events()}
    assert "sm90_forward" in events, f"the profile has {sorted(events)}"
    outer, inner = events["sm90_forward"].time_range, events["aten::sum"].time_range
    assert outer.start <= inner.start <= inner.end <= outer.end, f"range {outer}, aten::sum {inner}"


def test_without_a_profiler_a_range_leaves_nothing_behind(shim):
    record(shim, b"before")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        record(shim, b"during")
    record(shim, b"after")
    assert {event.name for event in profiler.events()} & {"before", "during", "after"} == {"during"}
