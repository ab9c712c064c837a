"""Defines the command line of the benchmarks that have one option, where to write their result."""

from __future__ import annotations

import argparse
import sys

import torch

from fa4_ext.bench.session import NO_DEVICE


def json_path(description: str) -> str | None:
    """Returns the path that --json names, or None. Ends the process if there is no GPU to measure
    on."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="PATH")
    path = parser.parse_args().json
    if not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    return path
