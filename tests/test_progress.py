"""Long jobs show how far they are: the build by lines alone, what builds on fa4_ext by a line that is
rewritten, where it writes to a terminal."""

from __future__ import annotations

import pytest

from fa4_ext.bench.progress import Progress
from kernels.progress import Progress as BuildProgress


class Output(list):
    def __init__(self, terminal):
        self.isatty = lambda: terminal

    write = list.append

    def flush(self):
        pass


def test_on_a_terminal_one_line_is_rewritten():
    now = [0.0]
    output = Output(terminal=True)
    progress = Progress(2, "problems", output, clock=lambda: now[0])
    progress.started("the first")
    now[0] = 65
    progress.finished()
    text = "".join(output)
    assert "1/2 problems, 1:05 elapsed, 1:05 left: the first" in text
    assert "\n" not in text and text.count("\r") == 2


@pytest.mark.parametrize(
    ("kind", "terminal"), [(Progress, False), (BuildProgress, False), (BuildProgress, True)]
)
def test_elsewhere_it_is_a_line_now_and_then(kind, terminal):
    now = [0.0]
    output = Output(terminal)
    progress = kind(100, "kernels", output, clock=lambda: now[0])
    for number in range(100):
        now[0] += 1
        progress.started(f"kernel {number}")
        progress.finished()
    lines = "".join(output).splitlines()
    assert 10 <= len(lines) <= 12 and "\r" not in "".join(output)
    assert lines[-1] == "100/100 kernels, 1:40 elapsed, 0:00 left: kernel 99"
