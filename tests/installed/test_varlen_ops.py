"""torch.nn.attention.varlen calls ops that a registration overrides, whichever backend this torch
prefers for it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from this_torch import VERSION
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from fa4_ext import _dispatcher

CALLS = {"_varlen_attn": False, "_varlen_attn_out": True}


class Seen(TorchDispatchMode):
    """Notes the attention ops that are called."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        if "attention" in name:
            self.ops.add(name)
        return func(*args, **(kwargs or {}))


def body(op: str):
    """Returns the Python that runs below the op; None where this torch has no such op."""
    custom = getattr(varlen, op, None)
    return getattr(custom, "_init_fn", None)


@pytest.mark.parametrize("cudnn", (False, True), ids=("flash", "cudnn"))
@pytest.mark.parametrize("op", CALLS)
def test_every_backend_of_varlen_calls_an_op_of_ours(op, cudnn, monkeypatch):
    function = body(op)
    if function is None:
        pytest.skip("this torch has no such op")
    for name in ("_should_use_cudnn", "_can_use_cudnn"):
        if hasattr(varlen, name):
            monkeypatch.setattr(varlen, name, lambda *given, **options: cudnn)
    with FakeTensorMode(allow_non_fake_inputs=True), Seen() as seen:
        tensor = torch.empty(512, 8, 64, dtype=torch.bfloat16, device="cuda")
        starts = torch.tensor((0, 256, 512), dtype=torch.int32, device="cuda")
        given = [tensor] * (4 if CALLS[op] else 3) + [starts, starts, 256, 256]
        # Since torch 2.15 the caller chooses the backend.
        chosen = getattr(varlen, "_CUDNN_ATTENTION_BACKEND", None) if cudnn else None
        with contextlib.suppress(Exception):  # what comes after the op may need a GPU
            function(*given, **({} if chosen is None else {"backend": chosen}))
    # Before torch 2.15 cuDNN writes into no output: torch 2.13 refuses, 2.14 takes flash attention.
    if cudnn and CALLS[op] and VERSION < (2, 14):
        assert not seen.ops, seen.ops
        return
    assert seen.ops, "no attention op was seen"
    assert seen.ops <= set(_dispatcher.OPS), seen.ops - set(_dispatcher.OPS)
