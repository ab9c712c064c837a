"""This module registers the kernels with PyTorch. It keeps the handles and the options in force."""

from __future__ import annotations

import os
import warnings

from typing_extensions import Self

from fa4_ext import _disable, _environment, _library, _providers
from fa4_ext._lock import Lock

OPTIONS = ("fallback", "prefer", "speed_rules", "provides", "disable")  # of `register`

#: The import's own registration. None if FA4_EXT_AUTOREGISTER is off or the native library could
#: not be loaded.
default_handle: Handle | None = None

_lock = Lock()
_live: list[Handle] = []  # oldest first; the newest one's options are in force
_overriding = False  # our overrides are in the dispatcher, or an interrupted call put them there
# The handle whose options the library has; None where an interrupted call may have changed them.
_in_force: Handle | None = None
_imported = False
_by_environment: tuple[str, ...] = ()  # patterns of FA4_EXT_DISABLE as the import found it
_warned = False


class Handle:
    """A registration, made by `register`.

    The kernels are in PyTorch's dispatcher exactly while at least one handle is live, and the
    newest live handle's options are in force. Dropping the last reference to a handle does not
    remove it. As a context manager, a handle is removed at the end of its block.

    Attributes:
        fallback: the option of `register`, "stock" or "error".
        prefer: the option of `register`.
        speed_rules: the option of `register`.
        provides: the option of `register`, a tuple.
        disable: the option of `register`, a tuple.
    """

    def __init__(
        self,
        fallback: str,
        prefer: bool,
        speed_rules: bool,
        provides: tuple[str, ...] = (),
        disable: tuple[str, ...] = (),
    ):
        self.fallback = fallback
        self.prefer = prefer
        self.speed_rules = speed_rules
        self.provides = provides
        self.disable = disable

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


def register(
    fallback: str = "stock",
    prefer: bool = True,
    speed_rules: bool = True,
    provides: tuple[str, ...] = (),
    disable: tuple[str, ...] | None = None,
) -> Handle:
    """Puts the compiled kernels behind PyTorch's attention ops on CUDA devices.

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
            kernel runs it, flash attention's or cuDNN's, as without a registration. With "error"
            the call raises a RuntimeError, "FA4 <op> unsupported: <reason>".
        prefer: whether these kernels also run the calls that PyTorch takes to cuDNN. On Hopper and
            Blackwell these are most calls of F.scaled_dot_product_attention, and from torch 2.14 on
            those of torch.nn.attention.varlen. Where the user has chosen cuDNN, by
            torch.nn.attention.sdpa_kernel or by switching flash attention off, cuDNN runs them
            whatever this says. With False these kernels run calls of the flash attention ops only.
        speed_rules: whether PyTorch's own kernel runs the calls that it was measured to run faster.
        provides: names of torch's own providers, out of "FA3" and "FA4", by which
            torch.nn.attention.activate_flash_attention_impl activates these kernels, with the
            options of this call. Removing the handle gives the names back; what has been activated
            by then stays until it is restored.
        disable: names of kernels that are left out, so that a program can go on while one of them
            is broken, such as ("sm90_decode_*",): in a name * stands for any text, ? for one
            character and [...] for one of several. Another kernel runs what it can of their calls,
            PyTorch's own the others. A kernel is left out with any of those that it is
            launched with. None means the patterns in the environment variable FA4_EXT_DISABLE,
            which are separated by commas or spaces.

    Returns:
        The handle that undoes the registration.

    Raises:
        ValueError: an argument has a value that is not allowed, or a pattern in `disable` matches
            no kernel of this build.
        RuntimeError: torch is too old, the native library could not be loaded or refuses to be
            used, PyTorch's dispatcher refused the overrides, or this torch's registry has no names
            to provide.
    """
    _check("fallback", fallback, ("stock", "error"))
    _check("prefer", prefer, (True, False))
    _check("speed_rules", speed_rules, (True, False))
    names = _providers.check(provides)
    _library.native()
    if names and (problem := _providers.problem()):
        raise RuntimeError(problem)
    disabled = _disabled_by_environment()[0] if disable is None else _disable.check(disable)
    _warn_once()
    handle = Handle(fallback, bool(prefer), bool(speed_rules), names, disabled)
    try:
        _begin(handle)
        return handle
    except BaseException:
        handle.remove()
        raise


@_lock
def _begin(handle: Handle) -> None:
    """Makes the handle live."""
    global _overriding
    # This comes first: the garbage collector may end another registration meanwhile, which must not
    # be the last one.
    _live.append(handle)
    _put_in_force(handle)
    _overriding = True
    _library.register()
    _providers.provide(
        handle.provides,
        handle,
        lambda: register(
            handle.fallback, handle.prefer, handle.speed_rules, disable=handle.disable
        ),
    )


def _settle() -> None:
    """Brings the library, the dispatcher and torch's registry in line with the live handles. Doing
    so again changes nothing, and completes what an exception interrupted."""
    while True:
        live = list(_live)
        _library.put_warnings_back()
        if live:
            _put_in_force(live[-1])
        else:
            _take_out()
        _providers.withdraw(live)
        if live == _live:  # the garbage collector ended no other registration meanwhile
            return


def _take_out() -> None:
    global _overriding, _in_force
    if _overriding:  # or else a C++ program's own registration would go
        _library.remove()
        _in_force = None
        # explain() and this library's own ops follow it without a registration, too
        _library.disable(_by_environment)
        _overriding = False


def _put_in_force(handle: Handle) -> None:
    global _in_force
    if handle is not _in_force:
        _in_force = None
        _library.set_option("strict", handle.fallback == "error")
        _library.set_option("speed_rules", handle.speed_rules)
        _library.set_option("prefer", handle.prefer)
        _library.disable(handle.disable)
        _in_force = handle


def _disabled_by_environment() -> tuple[tuple[str, ...], str | None]:
    return _disable.from_environment(os.environ.get("FA4_EXT_DISABLE"))


def _warn_once() -> None:
    global _warned
    if _warned:
        return
    if found := _environment.surprises(_environment.gather()):
        warnings.warn("fa4_ext.register(): " + " Also, ".join(found), RuntimeWarning, stacklevel=3)
    _warned = True  # not reached if the warning raised: the next call warns again


def register_at_import() -> None:
    """Registers as `import fa4_ext` does, and gives the import's warnings."""
    global default_handle, _imported, _by_environment
    if _library.problem:
        _warn_at_import(_library.problem)
    if _imported or default_handle:  # importlib.reload, or an import after one that was interrupted
        return
    if problem := _providers.offer(register, usable=not _library.problem):
        _warn_at_import(problem)
    wanted, problem = _environment.autoregister(os.environ.get("FA4_EXT_AUTOREGISTER"))
    if problem:
        _warn_at_import(problem)
    names, problem = _providers.from_environment(os.environ.get("FA4_EXT_PROVIDES"))
    if names and (problem := _providers.problem()):
        names = ()
    if problem:
        _warn_at_import(problem)
    disabled, problem = ((), None) if _library.problem else _disabled_by_environment()
    if problem:
        _warn_at_import(problem)
    if disabled:
        _by_environment = disabled
        _library.disable(disabled)
    if wanted and not _library.problem:
        handle = Handle("stock", True, True, names, disabled)
        try:
            default_handle = handle
            _begin(handle)
        except BaseException:
            handle.remove()
            default_handle = None
            raise
    _imported = True  # not reached if a warning raised: the next import warns again


def _warn_at_import(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=4)  # whoever imports fa4_ext


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
