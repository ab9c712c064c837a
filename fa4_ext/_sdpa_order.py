"""This module lets F.scaled_dot_product_attention try flash attention before its other backends
while a registration asks for it.

On Hopper and Blackwell torch prefers cuDNN, so that F.scaled_dot_product_attention would never call
our kernels. Torch sets its order once, at the first choice of a backend on CUDA, and overwrites
what was set before; what is set afterwards stays. So the order changes when CUDA comes up, or at
once if it is up: we have torch make its first choice, keep the order that it leaves, and put flash
in front. Nothing here brings CUDA up. The flags that enable a backend are the user's and stay as
they are.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend

from fa4_ext import _environment
from fa4_ext._lock import Lock

_FLASH = SDPBackend.FLASH_ATTENTION.value

# None of these is promised by torch.
_NEEDED = (
    "torch._C._get_sdp_priority_order",
    "torch._C._set_sdp_priority_order",
    "torch._C.DispatchKey",
    "torch._C.DispatchKeySet",
    "torch.Tensor._make_wrapper_subclass",
    "torch.cuda._lazy_call",
    "torch.ops.aten._fused_sdp_choice",
)

# Taken below torch.cuda's own lock: hold it across no call that may take that one.
_lock = Lock()
_wanted = False
# The registration for which a call of _apply waits for CUDA; None if none waits.
_queued_for: int | None = None
_replaced: list[_Replaced] = []  # oldest first


class _Replaced(NamedTuple):
    """An order of backends, the order that replaced it, and the number of the registration that
    asked for the replacement. A newer registration has a higher number."""

    before: list[int]
    ours: list[int]
    owner: int


class _Shape(torch.Tensor):
    """A tensor without memory, so that no CUDA context is made: choosing a backend looks at shapes,
    types and devices only."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def _make_first_choice() -> None:
    # An exception would fail the user's first use of CUDA. Without a choice torch's own order
    # prevails: slower, not wrong.
    with contextlib.suppress(Exception):
        query = torch.Tensor._make_wrapper_subclass(
            _Shape, (1, 1, 64, 64), dtype=torch.float16, device="cuda"
        )
        # Straight to the CUDA kernel: a mode that happens to be active, such as FakeTensorMode,
        # would get in between.
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        torch.ops.aten._fused_sdp_choice.default.redispatch(cuda, query, query, query)


def _apply_queued() -> None:
    """Runs while CUDA comes up. An error would fail the user's first use of CUDA, so it becomes a
    warning."""
    global _queued_for
    # Before a look at _wanted: put_flash_first asks for both in the other order, so that one of the
    # two sees the other.
    owner, _queued_for = _queued_for, None
    try:
        if _wanted and owner is not None:
            _apply(owner)
    except Exception as error:
        with contextlib.suppress(Exception):  # where warnings are errors
            warnings.warn(f"fa4_ext: {_failed(error)}", RuntimeWarning, stacklevel=2)
    except BaseException:
        _queued_for = owner  # torch runs its whole queue again
        raise


@_lock
def _apply(owner: int) -> None:
    # Every call runs PyTorch's kernels then, for which PyTorch's own order is the faster one.
    if _environment.driver_too_old():
        return
    _make_first_choice()
    current = torch._C._get_sdp_priority_order()
    ours = [_FLASH, *(backend for backend in current if backend != _FLASH)]
    if current == ours:
        return
    # This comes first, so that the order can be put back if this is interrupted.
    _replaced.append(_Replaced(current, ours, owner))
    try:
        torch._C._set_sdp_priority_order(ours)
    except Exception:
        _replaced.pop()
        raise


def problem() -> str | None:
    """Returns why the order of this torch cannot be changed, or None."""
    missing = [name for name in _NEEDED if not _has(name)]
    if not missing:
        return None
    return f"torch {torch.__version__} has no {', '.join(missing)}: {_UNCHANGED}"


_UNCHANGED = (
    "F.scaled_dot_product_attention tries its backends in PyTorch's order, as with prefer=False, "
    "and may take calls to others than "
    "flash attention."
)


def _failed(error: Exception) -> str:
    return f"putting flash attention first failed, {error!r}: {_UNCHANGED}"


def _has(name: str) -> bool:
    try:
        operator.attrgetter(name.removeprefix("torch."))(torch)
    except AttributeError:
        return False
    return True


def current() -> list[int] | None:
    """Returns the backends in order, or None if this torch does not tell."""
    return torch._C._get_sdp_priority_order() if _has("torch._C._get_sdp_priority_order") else None


def is_wanted() -> bool:
    return _wanted


def put_flash_first(owner: int) -> str | None:
    """Puts flash first from now on, or if CUDA is not up, from the moment that it comes up. Returns
    why that is impossible, or None."""
    global _wanted, _queued_for
    if found := problem():
        return found
    wanted_before, queued_before = _wanted, _queued_for
    try:
        _wanted = True
        if torch.cuda.is_initialized():
            _apply(owner)
        elif _queued_for is None:
            _queued_for = owner
            torch.cuda._lazy_call(_apply_queued)
    except BaseException as error:
        _wanted, _queued_for = wanted_before, queued_before
        if isinstance(error, Exception):
            return _failed(error)
        raise
    return None


def put_back() -> None:
    """Restores the order that ours replaced, unless someone has changed ours since. Flash attention
    is then not put first when CUDA comes up later."""
    global _wanted
    _wanted = False
    put_back_newer_than(0)


@_lock
def put_back_newer_than(owner: int) -> None:
    """Restores the orders that newer registrations than `owner` replaced, unless someone has
    changed ours since."""
    if not any(replaced.owner > owner for replaced in _replaced):
        return
    current = torch._C._get_sdp_priority_order()
    for replaced in list(_replaced):
        if replaced.owner > owner:
            if current == replaced.ours:
                torch._C._set_sdp_priority_order(replaced.before)
            # This comes last, so that an interruption leaves the rest to the next time.
            _replaced.remove(replaced)
