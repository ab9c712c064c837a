"""Registrations with PyTorch: handles, the options in force, torch's registry of flash attention providers."""

from __future__ import annotations

import os
import threading
import warnings

from torch.nn import attention
from typing_extensions import Self

from fa4_ext import _environment, _library, _sdpa_order

PROVIDER = "FA4_EXT"

_lock = threading.RLock()
_live: list[Handle] = []  # oldest first; the newest one's options are in force
_warned = False


class Handle:
    """A live registration; `register` makes them.

    Our kernels are in PyTorch's dispatcher exactly while at least one handle is live, and the newest live handle's options are in
    force. Dropping the last reference to a handle does not remove it. As a context manager it ends with its block.
    """

    def __init__(self, fallback: str, prefer: bool, speed_rules: bool):
        self.fallback = fallback
        self.prefer = prefer
        self.speed_rules = speed_rules

    @property
    def active(self) -> bool:
        """Whether it has not been removed yet."""
        return self in _live

    def remove(self) -> None:
        """Ends the registration; the last one leaves PyTorch as it was. Calling it again does nothing."""
        with _lock:
            if self not in _live:
                return
            was_newest = _live[-1] is self
            _live.remove(self)
            if not _live:
                _library.remove()
            elif was_newest:
                _library.configure(**_native_options(_live[-1]))
            if was_newest:
                _set_preference(_live[-1] if _live else None, instead_of=self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"<fa4_ext.Handle {state} fallback={self.fallback!r} prefer={self.prefer} speed_rules={self.speed_rules}>"


def register(fallback: str = "stock", prefer: bool = True, speed_rules: bool = True) -> Handle:
    """Puts the compiled kernels behind PyTorch's flash attention ops on CUDA devices.

    The overrides go on top of whatever other provider is registered; registering again puts them on top again. Needs no GPU and
    touches none. PyTorch's dispatcher does not guard running calls against changes: let no thread be inside one of these ops
    meanwhile, nor in `Handle.remove`.

    Where no call could run these kernels, the first call of `register` in a process says so in a RuntimeWarning: the driver is
    missing or too old, or torch is built without CUDA although there is a driver. It is silent where torch has no CUDA and the
    machine no driver: nothing there is meant to run on a GPU, and tests that turn warnings into errors can register. It is silent
    about the devices too, since asking for them would initialise CUDA and keep it from processes forked later. `python -m fa4_ext
    doctor` looks at everything.

    Args:
        fallback: what happens to a call that no compiled kernel covers. "stock": PyTorch's own flash kernel runs it. "error": it
            raises a RuntimeError, "FA4 <op> unsupported: <reason>".
        prefer: make F.scaled_dot_product_attention try flash attention before its other backends; PyTorch prefers cuDNN on Hopper
            and Blackwell. The switches of torch.nn.attention.sdpa_kernel and torch.backends.cuda keep their meaning. Without effect
            where the driver is too old for our kernels.
        speed_rules: leave calls to the stock kernel that it is measured to run faster.

    Returns:
        The handle that undoes the registration.

    Raises:
        ValueError: an argument has a value that is not allowed.
        RuntimeError: torch is too old, the native library could not be loaded, or PyTorch's dispatcher refused the overrides.
    """
    _check("fallback", fallback, ("stock", "error"))
    _check("prefer", prefer, (True, False))
    _check("speed_rules", speed_rules, (True, False))
    _library.native()
    _warn_once()
    return _begin(Handle(fallback, bool(prefer), bool(speed_rules)))


def _begin(handle: Handle) -> Handle:
    with _lock:
        _live.append(handle)  # first: the garbage collector may end another registration meanwhile, which must not be the last one
        try:
            _library.configure(**_native_options(handle))
            _library.register()
            if handle.prefer:
                _sdpa_order.put_flash_first(handle)
            else:
                _sdpa_order.put_back()
        except BaseException:
            handle.remove()
            raise
    return handle


def _warn_once() -> None:
    global _warned
    if _warned:
        return
    if found := _environment.surprises(_environment.gather()):
        warnings.warn("fa4_ext.register(): " + " Also, ".join(found), RuntimeWarning, stacklevel=3)
    _warned = True  # not where the warning was an error: then the next call is one, too


def options_in_force() -> Handle | None:
    """The newest live handle."""
    with _lock:
        return _live[-1] if _live else None


def _native_options(handle: Handle) -> dict[str, bool]:
    return {"strict": handle.fallback == "error", "speed_rules": handle.speed_rules}


def _set_preference(newest: Handle | None, *, instead_of: Handle) -> None:
    """After the newest handle is gone."""
    if newest is None or not newest.prefer:
        _sdpa_order.put_back()
    elif instead_of.prefer:
        _sdpa_order.put_back(instead_of)
    else:
        _sdpa_order.put_flash_first(newest)


def _check(argument: str, value, allowed: tuple) -> None:
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


# So that torch.nn.attention.activate_flash_attention_impl("FA4_EXT") finds it. The registry asks providers not to activate
# themselves, so the import's own registration below stays outside of it: a provider activated later goes on top of ours, and
# restoring brings ours back.
if hasattr(attention, "register_flash_attention_impl"):  # a torch that is too old has no registry
    attention.register_flash_attention_impl(PROVIDER, register_fn=register)

#: The import's own registration; None with FA4_EXT_AUTOREGISTER=0, and where the native library could not be loaded.
default_handle: Handle | None = None
if os.environ.get("FA4_EXT_AUTOREGISTER") != "0" and not _library.problem:
    default_handle = _begin(Handle("stock", True, True))
