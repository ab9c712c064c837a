"""The order in which F.scaled_dot_product_attention tries its backends: flash first while a registration asks for it.

On Hopper and Blackwell torch prefers cuDNN, and our kernels would never be asked. Torch decides that once, in the first choice of
a backend on CUDA, and overwrites what was set before; what is set afterwards stays. So the order changes when CUDA comes up, or at
once where it is up: we have torch make its first choice, keep the order that it leaves, and put flash in front. Nothing here brings
CUDA up. The flags that enable a backend are the user's and stay as they are.
"""

from __future__ import annotations

import contextlib
import threading
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend

from fa4_ext import _environment

_FLASH = SDPBackend.FLASH_ATTENTION.value

# Taken below torch.cuda's own lock: hold it across no call that may take that one. Reentrant, as the garbage collector may end a
# registration while another is made.
_lock = threading.RLock()
_wanted = False
_queued_for: object | None = None  # a call of _apply waits for CUDA, on behalf of whom
_replaced: list[_Replaced] = []  # oldest first


class _Replaced(NamedTuple):
    """An order, ours in its place, and on whose behalf."""

    before: list[int]
    ours: list[int]
    owner: object


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


def _apply_queued() -> None:
    global _queued_for
    with _lock:
        owner, _queued_for = _queued_for, None
    _apply(owner)


def _apply(owner: object) -> None:
    with _lock:
        if not _wanted or _environment.driver_too_old():  # every call is PyTorch's then, whose own order is the faster one
            return
        _make_first_choice()
        current = torch._C._get_sdp_priority_order()
        if any(current == replaced.ours for replaced in _replaced):
            return
        ours = [_FLASH, *(backend for backend in current if backend != _FLASH)]
        _replaced.append(_Replaced(current, ours, owner))
        torch._C._set_sdp_priority_order(ours)


def put_flash_first(owner: object) -> None:
    """Flash first from now on; before CUDA is up, from the moment it comes up."""
    global _wanted, _queued_for
    with _lock:
        _wanted = True
        up, queue = torch.cuda.is_initialized(), _queued_for is None
        if not up and queue:
            _queued_for = owner
    if up:
        _apply(owner)
    elif queue:
        torch.cuda._lazy_call(_apply_queued)


def put_back(owner: object | None = None) -> None:
    """Restores the order that `put_flash_first` replaced, for this owner or for all, unless someone has changed it since."""
    global _wanted
    with _lock:
        _wanted = _wanted and owner is not None
        current = torch._C._get_sdp_priority_order()
        for replaced in list(_replaced):
            if owner is None or replaced.owner is owner:
                _replaced.remove(replaced)
                if current == replaced.ours:
                    torch._C._set_sdp_priority_order(replaced.before)
