"""Runs kernels in child processes, so that one that hangs, or ends the process, takes only itself
along. A child runs one kernel after the other until then."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from fa4_ext.selftest.attempt import FAILED, NOT_RUN

HUNG, CRASHED = "hung", "crashed"

_KILL_SECONDS = 10  # to wait for a killed process, which the driver may hold up
_TAIL = 400  # characters of what a process said last


@dataclass(frozen=True)
class Limits:
    """Seconds: a child may take so long to start, and so long for a kernel."""

    start: float = 180
    kernel: float = 30


@dataclass(frozen=True)
class Outcome:
    """What became of a kernel.

    Attributes:
        kernel: its name.
        status: what attempt() returns, or HUNG, or CRASHED.
        detail: a sentence about it, or "".
        seconds: that it took.
    """

    kernel: str
    status: str
    detail: str
    seconds: float


class HungError(Exception):
    """A child gave no answer in time."""


class DiedError(Exception):
    """A child ended without an answer. The text says how."""


class Child:
    """A process that answers lines with lines of JSON.

    Raises:
        HungError, DiedError: it did not get ready.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], seconds: float):
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            start_new_session=True,
        )
        self._buffer = b""
        try:
            self.ready = self._answer(seconds)
        except BaseException:
            self.kill()
            raise

    def ask(self, line: str, seconds: float) -> dict:
        """Returns the answer to a line.

        Raises:
            HungError, DiedError: there was none. The process is good for nothing then.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict:
        assert self._process.stdout
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise HungError(f"no answer in {seconds:g} s")
                read = os.read(self._process.stdout.fileno(), 65536)
                if not read:
                    raise self._died()
                self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _died(self) -> DiedError:
        try:
            code = self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return DiedError("the process closed its output and did not end")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip()[-_TAIL:]
        return DiedError(f"the process ended with {how}" + (f": {said}" if said else ""))

    def kill(self) -> None:
        """Ends the process and those that it started, and waits a while for it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)
        for stream in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(OSError):
                if stream:
                    stream.close()


def supervise(
    command: Sequence[str],
    names: Sequence[str],
    limits: Limits,
    environment: dict[str, str] | None = None,
) -> Generator[Outcome, None, None]:
    """Yields what becomes of each of these kernels, in this order. `command` starts a child.

    Where no child starts, or starts any more, the kernels that are left are NOT_RUN.
    """
    environment = dict(os.environ) if environment is None else environment
    child: Child | None = None
    problem = ""
    try:
        for name in names:
            begin = time.monotonic()
            if child is None and not problem:
                child, problem = _start(command, environment, limits)
            if child is None:
                yield Outcome(name, NOT_RUN, problem, 0.0)
                continue
            status, detail, usable = _ask(child, name, limits)
            yield Outcome(name, status, detail, time.monotonic() - begin)
            if not usable:
                child.kill()
                child = None
    finally:
        if child:
            child.kill()


def _start(
    command: Sequence[str], environment: dict[str, str], limits: Limits
) -> tuple[Child | None, str]:
    try:
        return Child(command, environment, limits.start), ""
    except (HungError, DiedError) as error:
        return None, f"no process that runs kernels starts: {error}"


def _ask(child: Child, name: str, limits: Limits) -> tuple[str, str, bool]:
    """Returns a status, a sentence, and whether the child can go on."""
    try:
        answer = child.ask(name, limits.kernel)
    except HungError as error:
        return HUNG, str(error), False
    except DiedError as error:
        return CRASHED, str(error), False
    failed = answer["status"] == FAILED
    return (CRASHED if failed else answer["status"]), answer["detail"], not failed
