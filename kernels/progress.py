"""How far a long job is: one line that is rewritten on a terminal, a line now and then
elsewhere."""

import sys
import threading
import time

SECONDS_BETWEEN_LINES = 10  # where output goes to a file
BAR_WIDTH = 24


def duration(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    def __init__(self, total: int, stream=sys.stderr, clock=time.monotonic, what: str = "kernels"):
        self.total, self.stream, self.clock, self.what = total, stream, clock, what
        self.done, self.current, self.begin, self.shown = 0, "", clock(), clock()
        self.lock = threading.Lock()

    def started(self, name: str) -> None:
        with self.lock:
            self.current = name
            self._show()

    def finished(self) -> None:
        with self.lock:
            self.done += 1
            self._show()

    def text(self) -> str:
        elapsed = self.clock() - self.begin
        left = (
            f"{duration(elapsed / self.done * (self.total - self.done))} left"
            if self.done
            else "starting"
        )
        return (
            f"{self.done}/{self.total} {self.what}, {duration(elapsed)} elapsed, {left}: "
            f"{self.current}"
        )

    def _show(self) -> None:
        if self.stream.isatty():
            filled = BAR_WIDTH * self.done // self.total
            end = "\n" if self.done == self.total else ""
            print(
                f"\r\033[K[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {self.text()}",
                end=end,
                file=self.stream,
                flush=True,
            )
        elif self.done == self.total or self.clock() - self.shown >= SECONDS_BETWEEN_LINES:
            self.shown = self.clock()
            print(self.text(), file=self.stream, flush=True)
