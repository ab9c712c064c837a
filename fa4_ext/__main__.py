"""python -m fa4_ext demo | doctor | status | kernels | explain | bench | selftest"""

from __future__ import annotations

import argparse
import signal
import sys

import fa4_ext
from fa4_ext import (
    _cli_bench,
    _cli_demo,
    _cli_doctor,
    _cli_explain,
    _cli_kernels,
    _cli_selftest,
    _cli_status,
    _library,
)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fa4_ext",
        description="FlashAttention-4 for PyTorch, compiled ahead of time.",
    )
    parser.add_argument("--version", action="version", version=fa4_ext.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in (
        _cli_demo,
        _cli_doctor,
        _cli_status,
        _cli_kernels,
        _cli_explain,
        _cli_bench,
        _cli_selftest,
    ):
        command.add_to(commands)
    arguments = parser.parse_args(_cli_explain.join_window(words))
    if _library.problem and not arguments.needs_no_library:
        parser.exit(1, f"{parser.prog}: {_library.problem}\n")
    try:
        return arguments.run(arguments) or 0
    except ValueError as error:
        commands.choices[arguments.command].error(str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the command, without a traceback
    sys.exit(main(sys.argv[1:]))
