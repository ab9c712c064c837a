"""The order in which F.scaled_dot_product_attention tries its backends: flash first while a registration asks for it.

On Hopper and Blackwell torch prefers cuDNN, and our kernels would never be asked. Torch decides that once, in the first choice of
a backend on CUDA, and overwrites what was set before; what is set afterwards stays. So the order changes when CUDA comes up, or at
once where it is up: we have torch make its first choice, keep the order that it leaves, and put flash in front. Nothing here brings
CUDA up. The flags that enable a backend are the user's and stay as they are.
"""

from __future__ import annotations

import contextlib
import threading

import torch
from torch.nn.attention import SDPBackend

_FLASH = SDPBackend.FLASH_ATTENTION.value

_lock = threading.Lock()  # taken below torch.cuda's own lock: hold it across no call that may take that one
_wanted = False
_queued = False  # a call of _apply waits for CUDA
_before: list[int] | None = None  # the order that ours replaced
_ours: list[int] | None = None


class _Shape(torch.Tensor):
    """A tensor without memory, so that no CUDA context is made: choosing a backend looks at shapes, types and devices only."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def _make_first_choice() -> None:
    # An exception would fail the user's first use of CUDA. Without a choice torch's own order prevails: slower, not wrong.
    with contextlib.suppress(Exception):
        query = torch.Tensor._make_wrapper_subclass(_Shape, (1, 1, 64, 64), dtype=torch.float16, device="cuda")
        # Straight to the CUDA kernel: a mode that happens to be active, such as FakeTensorMode, would get in between.
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        torch.ops.aten._fused_sdp_choice.default.redispatch(cuda, query, query, query)


def _apply() -> None:
    global _queued, _before, _ours
    with _lock:
        _queued = False
        if not _wanted:
            return
        _make_first_choice()
        current = torch._C._get_sdp_priority_order()
        if current == _ours:
            return
        _before, _ours = current, [_FLASH, *(backend for backend in current if backend != _FLASH)]
        torch._C._set_sdp_priority_order(_ours)


def put_flash_first() -> None:
    """Flash first from now on; before CUDA is up, from the moment it comes up."""
    global _wanted, _queued
    with _lock:
        _wanted = True
        queue, _queued = not _queued, True
    if torch.cuda.is_initialized():
        _apply()
    elif queue:
        torch.cuda._lazy_call(_apply)


def put_back() -> None:
    """Restores the order that `put_flash_first` replaced, unless someone has changed it since."""
    global _wanted, _before, _ours
    with _lock:
        _wanted = False
        if _ours is not None and torch._C._get_sdp_priority_order() == _ours:
            torch._C._set_sdp_priority_order(_before)
        _before = _ours = None
