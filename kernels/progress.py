"""Shows how far a build is, by a line now and then: that reads as well in a log.

fa4_ext/bench/progress.py has the one that draws on a terminal. The build can't import it, because
fa4_ext needs the library that is being built.
"""

import math
import sys
import threading
import time

SECONDS_BETWEEN_LINES = 10


def duration(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    def __init__(self, total: int, what: str = "kernels", stream=sys.stderr, clock=time.monotonic):
        self.total, self.what, self.stream, self.clock = total, what, stream, clock
        self.done, self.current, self.begin, self.shown = 0, "", clock(), -math.inf
        self.lock = threading.Lock()

    def started(self, name: str) -> None:
        with self.lock:
            self.current = name
            self._show()

    def finished(self) -> None:
        with self.lock:
            self.done += 1
            self._show()

    def _show(self) -> None:
        now = self.clock()
        if self.done < self.total and now - self.shown < SECONDS_BETWEEN_LINES:
            return
        self.shown, elapsed = now, now - self.begin
        times = f"{duration(elapsed)} elapsed"
        if self.done:
            times += f", {duration(elapsed / self.done * (self.total - self.done))} left"
        line = f"{self.done}/{self.total} {self.what}, {times}: {self.current}"
        print(line, file=self.stream, flush=True)
