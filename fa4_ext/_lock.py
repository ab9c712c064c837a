"""The locks that guard registrations."""

from __future__ import annotations

import contextlib
import threading


class Lock(contextlib.ContextDecorator, type(threading.RLock())):  # type: ignore[misc]
    """A reentrant lock that also decorates functions, which hold it while they run.

    It is reentrant because the garbage collector may end a registration while another is made. A
    decorated function releases the lock wherever an exception interrupts it. A `with` statement
    could be interrupted while it exits, and keep the lock.
    """
