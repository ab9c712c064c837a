"""This module registers the kernels with PyTorch. It keeps the handles and the options in force,
and offers the package to torch's registry of flash attention providers."""

from __future__ import annotations

import itertools
import os
import warnings

from torch.nn import attention
from typing_extensions import Self

from fa4_ext import _environment, _library, _sdpa_order
from fa4_ext._lock import Lock

PROVIDER = "FA4_EXT"
OPTIONS = ("fallback", "prefer", "speed_rules")  # of `register`

#: The import's own registration. None if FA4_EXT_AUTOREGISTER is off or the native library could
#: not be loaded.
default_handle: Handle | None = None

_lock = Lock()
_numbers = itertools.count(1)
_live: list[Handle] = []  # oldest first; the newest one's options are in force
_overriding = False  # our overrides are in the dispatcher, or an interrupted call put them there
# The handle whose options the library has; None where an interrupted call may have changed them.
_in_force: Handle | None = None
_imported = False
_warned = False


class Handle:
    """A registration, made by `register`.

    The kernels are in PyTorch's dispatcher exactly while at least one handle is live, and the
    newest live handle's options are in force. Dropping the last reference to a handle does not
    remove it. As a context manager, a handle is removed at the end of its block.

    Attributes:
        fallback: the option of `register`, "stock" or "error".
        prefer: the option of `register`; False also if this torch's order of backends
            could not be changed.
        speed_rules: the option of `register`.
    """

    def __init__(self, fallback: str, prefer: bool, speed_rules: bool):
        self.fallback = fallback
        self.prefer = prefer
        self.speed_rules = speed_rules
        self._number = 0  # its place among all registrations, from 1 on; 0 before it began

    @property
    def active(self) -> bool:
        """Whether this registration is live: it began and has not been removed."""
        return self in _live

    @_lock
    def remove(self) -> None:
        """Ends this registration. Removing the last live handle leaves PyTorch as it was.

        Removing a handle again does nothing, unless an exception such as KeyboardInterrupt cut the
        first time short: then it does the rest.

        Removing the last live handle changes PyTorch's dispatcher, which does not protect running
        calls: no thread may be inside an attention call meanwhile. Removing any other handle leaves
        the dispatcher alone and is safe.
        """
        if self in _live:
            _live.remove(self)
        _settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        options = " ".join(f"{name}={getattr(self, name)!r}" for name in OPTIONS)
        return f"<fa4_ext.Handle {state} {options}>"


def register(fallback: str = "stock", prefer: bool = True, speed_rules: bool = True) -> Handle:
    """Puts the compiled kernels behind PyTorch's flash attention ops on CUDA devices.

    The overrides go on top of any other provider's. Registering again puts them on top again, and
    leaves PyTorch's dispatcher alone if they are on top already. No GPU is needed or touched.

    PyTorch's dispatcher does not protect running calls from changes: a call during a change may run
    half of one kernel and half of another, and crash. Other threads may call attention whenever the
    dispatcher stays as it is: while a handle lives and no other provider is on top, registering
    leaves it alone, and so does removing any handle but the last. So one handle that lives as long
    as the process, such as the import's own, makes all others safe. No thread may be inside one of
    these ops while the first handle is made, while the last one is removed, or while registering
    again over another provider.

    An exception such as KeyboardInterrupt leaves nothing registered by this call.

    The first call in a process gives a RuntimeWarning if no attention call could run these kernels:
    the driver is missing or too old, or torch is built without CUDA although there is a driver. It
    is silent if torch has no CUDA and the machine no driver, because nothing there is meant to run
    on a GPU, and tests that turn warnings into errors can register. It does not look at the
    devices, because that would initialise CUDA and keep it from processes that are forked later.
    `python -m fa4_ext doctor` looks at everything.

    Args:
        fallback: what happens to a call that no compiled kernel covers. With "stock" PyTorch's own
            flash attention kernel runs it. With "error" the call raises a RuntimeError, "FA4 <op>
            unsupported: <reason>".
        prefer: whether F.scaled_dot_product_attention tries flash attention before its other
            backends; PyTorch prefers cuDNN on Hopper and Blackwell. The switches of
            torch.nn.attention.sdpa_kernel and torch.backends.cuda keep their meaning. This has no
            effect if the driver is too old for the kernels. If this torch has no such order to
            change, there is a RuntimeWarning and the handle's `prefer` is False.
        speed_rules: whether PyTorch's own kernel runs the calls that it was measured to run faster.

    Returns:
        The handle that undoes the registration.

    Raises:
        ValueError: an argument has a value that is not allowed.
        RuntimeError: torch is too old, the native library could not be loaded or refuses to be
            used, or PyTorch's dispatcher refused the overrides.
    """
    _check("fallback", fallback, ("stock", "error"))
    _check("prefer", prefer, (True, False))
    _check("speed_rules", speed_rules, (True, False))
    _library.native()
    _warn_once()
    handle = Handle(fallback, bool(prefer), bool(speed_rules))
    try:
        if problem := _begin(handle):
            warnings.warn(f"fa4_ext.register(): {problem}", RuntimeWarning, stacklevel=2)
        return handle
    except BaseException:
        handle.remove()
        raise


@_lock
def _begin(handle: Handle) -> str | None:
    """Makes the handle live. If `prefer` asked for flash attention first and that is impossible, it
    returns why and sets the handle's `prefer` to False."""
    global _overriding
    handle._number = next(_numbers)
    # This comes first: the garbage collector may end another registration meanwhile, which must not
    # be the last one.
    _live.append(handle)
    _put_in_force(handle)
    _overriding = True
    _library.register()
    if not handle.prefer:
        _sdpa_order.put_back()
        return None
    problem = _sdpa_order.put_flash_first(handle._number)
    handle.prefer = problem is None
    return problem


def _settle() -> None:
    """Brings the library, the dispatcher and the order of backends in line with the live handles.
    Doing so again changes nothing, and completes what an exception interrupted."""
    while True:
        live = list(_live)
        _library.put_warnings_back()
        if live:
            _put_in_force(live[-1])
        else:
            _take_out()
        _settle_order(live[-1] if live else None)
        if live == _live:  # the garbage collector ended no other registration meanwhile
            return


def _take_out() -> None:
    global _overriding
    if _overriding:  # or else a C++ program's own registration would go
        _library.remove()
        _overriding = False


def _put_in_force(handle: Handle) -> None:
    global _in_force
    if handle is not _in_force:
        _in_force = None
        _library.set_option("strict", handle.fallback == "error")
        _library.set_option("speed_rules", handle.speed_rules)
        _in_force = handle


def _settle_order(newest: Handle | None) -> None:
    if newest is None or not newest.prefer:
        _sdpa_order.put_back()
    elif _sdpa_order.is_wanted():
        _sdpa_order.put_back_newer_than(newest._number)
    else:
        _sdpa_order.put_flash_first(newest._number)


def _warn_once() -> None:
    global _warned
    if _warned:
        return
    if found := _environment.surprises(_environment.gather()):
        warnings.warn("fa4_ext.register(): " + " Also, ".join(found), RuntimeWarning, stacklevel=3)
    _warned = True  # not where the warning was an error: then the next call is one, too


def register_at_import() -> None:
    """Registers as `import fa4_ext` does, and gives the import's warnings."""
    global default_handle, _imported
    if _library.problem:
        _warn_at_import(_library.problem)
    if _imported or default_handle:  # importlib.reload, or an import after one that was interrupted
        return
    if problem := _offer_to_registry():
        _warn_at_import(problem)
    wanted, problem = _environment.autoregister(os.environ.get("FA4_EXT_AUTOREGISTER"))
    if problem:
        _warn_at_import(problem)
    if wanted and not _library.problem:
        handle = Handle("stock", True, True)
        try:
            default_handle = handle
            if problem := _begin(handle):
                _warn_at_import(f"fa4_ext: {problem}")
        except BaseException:
            handle.remove()
            default_handle = None
            raise
    _imported = True  # not where a warning was an error: then the next import is one, too


def _warn_at_import(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=4)  # whoever imports fa4_ext


def _offer_to_registry() -> str | None:
    """Lets torch.nn.attention.activate_flash_attention_impl("FA4_EXT") find this package. Returns a
    sentence for the warning if torch's registry refuses, or None.

    The registry asks providers not to activate themselves, so the import's own registration stays
    outside of it: a provider that is activated later goes on top of ours, and restoring brings ours
    back.
    """
    try:
        # a torch that is too old has no registry
        offer = getattr(attention, "register_flash_attention_impl", None)
        # A copy of this package that can't be used leaves the place to the one that can.
        if offer and not (_library.problem and PROVIDER in attention.list_flash_attention_impls()):
            offer(PROVIDER, register_fn=register)
    except Exception as error:
        return (
            f"torch.nn.attention's registry does not take {PROVIDER}: {error!r}. "
            "fa4_ext.register() does not need it."
        )
    return None


def options_in_force() -> Handle | None:
    """Returns the newest live handle, or None without one."""
    live = list(_live)
    return live[-1] if live else None


def _check(argument: str, value, allowed: tuple) -> None:
    if not any(
        value is choice or (type(value) is type(choice) and value == choice) for choice in allowed
    ):
        raise ValueError(
            f"{argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
        )
