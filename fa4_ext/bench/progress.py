"""Shows how far a long job is: one line that is rewritten on a terminal, a line now and then
elsewhere."""

import sys
import time

SECONDS_BETWEEN_LINES = 10  # where output goes to a file
BAR_WIDTH = 24


def duration(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    def __init__(self, total: int, what: str, stream=sys.stderr, clock=time.monotonic):
        self.total, self.what, self.stream, self.clock = total, what, stream, clock
        self.done, self.current, self.begin, self.shown = 0, "", clock(), clock()

    def started(self, name: str) -> None:
        self.current = name
        self._show()

    def finished(self) -> None:
        self.done += 1
        self._show()

    def text(self) -> str:
        elapsed, left = self.clock() - self.begin, "starting"
        if self.done:
            left = f"{duration(elapsed / self.done * (self.total - self.done))} left"
        return (
            f"{self.done}/{self.total} {self.what}, {duration(elapsed)} elapsed, {left}: "
            f"{self.current}"
        )

    def _show(self) -> None:
        if self.stream.isatty():
            filled = BAR_WIDTH * self.done // self.total
            bar = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]"
            end = "\n" if self.done == self.total else ""
            print(f"\r\033[K{bar} {self.text()}", end=end, file=self.stream, flush=True)
        elif self.done == self.total or self.clock() - self.shown >= SECONDS_BETWEEN_LINES:
            self.shown = self.clock()
            print(self.text(), file=self.stream, flush=True)
