"""Fixtures of the tests of integrations, which run without a GPU."""

from __future__ import annotations

from collections import Counter

import math_ops
import pytest
import torch
import transformers

from fa4_ext.integrations.transformers import attention, register

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # the models are small, and the tests run side by side


class Calls(Counter):
    """Counts the attention calls: "kernels" on the library's functions, "elsewhere" on others."""

    def clear(self) -> None:
        super().clear()
        math_ops.calls.clear()

    @property
    def kernels(self) -> int:
        return math_ops.calls.count("attention")

    @property
    def elsewhere(self) -> int:
        return self["elsewhere"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Registers the integration, and lets the kernels' stand-in compute on the CPU."""
    monkeypatch.setitem(attention.DTYPES, "cpu", (torch.float32, torch.bfloat16))
    register()
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch) -> Calls:
    counted = Calls()
    for name in ("_sdpa", "_eager"):
        original = getattr(attention, name)

        def counting(*arguments, _original=original, **others):
            counted["elsewhere"] += 1
            return _original(*arguments, **others)

        monkeypatch.setattr(attention, name, counting)
    counted.clear()
    return counted
