"""The order in which F.scaled_dot_product_attention tries its backends: flash first while a
registration asks for it.

On Hopper and Blackwell torch prefers cuDNN, and our kernels would never be asked. Torch decides
that once, in the first choice of a backend on CUDA, and overwrites what was set before; what is set
afterwards stays. So the order changes when CUDA comes up, or at once where it is up: we have torch
make its first choice, keep the order that it leaves, and put flash in front. Nothing here brings
CUDA up. The flags that enable a backend are the user's and stay as they are.
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
_queued_for: int | None = None  # a call of _apply waits for CUDA, on behalf of whom
_replaced: list[_Replaced] = []  # oldest first


class _Replaced(NamedTuple):
    """An order, ours in its place, and on behalf of which registration; a newer one has a higher
    number."""

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
    # every call is PyTorch's then, whose own order is the faster one
    if _environment.driver_too_old():
        return
    _make_first_choice()
    current = torch._C._get_sdp_priority_order()
    ours = [_FLASH, *(backend for backend in current if backend != _FLASH)]
    if current == ours:
        return
    # first, so that where this is interrupted it can be put back
    _replaced.append(_Replaced(current, ours, owner))
    try:
        torch._C._set_sdp_priority_order(ours)
    except Exception:
        _replaced.pop()
        raise


def problem() -> str | None:
    """Why the order of this torch cannot be changed."""
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
    """The backends in order; None where this torch does not tell."""
    return torch._C._get_sdp_priority_order() if _has("torch._C._get_sdp_priority_order") else None


def is_wanted() -> bool:
    return _wanted


def put_flash_first(owner: int) -> str | None:
    """Puts flash first from now on, or where CUDA is not up from the moment it comes up. Returns
    why it can't."""
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
    """Flash is not to come first any more: restores the order of before, unless someone has changed
    ours since."""
    global _wanted
    _wanted = False
    put_back_newer_than(0)


@_lock
def put_back_newer_than(owner: int) -> None:
    """Restores what newer registrations than this one replaced, unless someone has changed ours
    since."""
    if not any(replaced.owner > owner for replaced in _replaced):
        return
    current = torch._C._get_sdp_priority_order()
    for replaced in list(_replaced):
        if replaced.owner > owner:
            if current == replaced.ours:
                torch._C._set_sdp_priority_order(replaced.before)
            # last, so that what interrupts this leaves it to the next time
            _replaced.remove(replaced)
