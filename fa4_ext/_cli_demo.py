"""This module is the command `python -m fa4_ext demo`."""

from __future__ import annotations

from fa4_ext import _demo


def add_to(commands) -> None:
    parser = commands.add_parser(
        "demo", help="run attention beside the stock kernel, or without a GPU show what would run"
    )
    parser.set_defaults(run=lambda arguments: _demo.run(), needs_no_library=False)
