"""This module is the command `python -m fa4_ext selftest`."""

from __future__ import annotations

import argparse

from fa4_ext import _cli_kernels, _cli_values

_DESCRIPTION = """\
Runs every kernel of this build for this GPU by itself, on small and odd problems, and
compares the results with attention in fp32. The kernels run in another process: one that
hangs is killed, and the next one goes on in a new process. The exit status is 0 where
every kernel is right, 1 where one is not, and 2 where there is no GPU for it."""

_EPILOG = """\
right         every result is within twice the error of PyTorch's own math, plus two roundings
wrong         a result is not, or is not written
hung          it did not end in time
crashed       a call raised an error, or the process ended
not loadable  the driver refused its code
not run       nothing is known: no problem gets to it, or no process starts any more

A kernel that is launched with others is right if one of those is.

--json writes an object:
  ok             whether every kernel is right
  device, compute_capability, driver, torch, cuda, build, seconds
  disable        names of the broken kernels, for FA4_EXT_DISABLE or register(disable=...)
  kernels        a list; of each: op, kernel (its name), status, detail, seconds

examples:
  selftest --json report.json
  selftest --kernels 'sm90_decode_*,*_forward_bf16_d128_*'
"""


def add_to(commands) -> None:
    parser = commands.add_parser(
        "selftest",
        help="run every kernel on this GPU and say which ones are broken",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kernels",
        metavar="PATTERN[,PATTERN]",
        help="only kernels whose names match, with * ? and [...]",
    )
    parser.add_argument(
        "--arch",
        type=_cli_kernels.arch,
        metavar="sm90",
        help="on the first GPU of this kind: sm90, sm100 or sm103",
    )
    parser.add_argument(
        "--timeout",
        type=_cli_values.count,
        default=30,
        metavar="SECONDS",
        help="that a kernel may take, 30 by default",
    )
    parser.add_argument("--json", metavar="FILE", help="write the result, for a bug report")
    parser.set_defaults(run=_run, needs_no_library=False)


def _run(arguments) -> int:
    from fa4_ext.selftest import command  # only now: no other command needs these modules

    return command.run(arguments)
