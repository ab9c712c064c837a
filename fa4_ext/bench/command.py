"""Runs `python -m fa4_ext bench` with its options."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fa4_ext.bench import compare, figure, host, results, table, throughput
from fa4_ext.bench.contenders import contenders
from fa4_ext.bench.grids import GRIDS, Grid
from fa4_ext.bench.session import NO_DEVICE, header, session

ROUNDS, QUICK_ROUNDS = 7, 5  # enough for a median that repeats within the printed spread


def run(arguments) -> int:
    """Runs the command and returns its exit status.

    Raises:
        ValueError: an option's value is wrong.
    """
    figures = arguments.figure.split(",") if arguments.figure else []
    check_outputs([path for path in (arguments.json, arguments.csv, *figures) if path])
    figure.check(figures)
    old = results.load(arguments.compare, "--compare") if arguments.compare else None
    if arguments.result:
        check_shows_alone(arguments)
        result = results.load(arguments.result, "--from")
    else:
        grid = grid_of(arguments.grid)
        directions = directions_of(grid, arguments)
        if not torch.cuda.is_available():
            print(f"python -m fa4_ext bench: {NO_DEVICE}", file=sys.stderr)
            return 1
        result = measure(grid, directions, arguments)
    if arguments.json:
        results.save(result, arguments.json)
    if arguments.csv:
        results.write_csv(result, arguments.csv)
    # It comes after the files, because printing into a pipe that closes ends the process.
    print(table.text(result))
    if old:
        print(f"\n{compare.text(old, result)}")
    if figures:
        figure.draw(result, figures)
    return 0


def check_shows_alone(arguments) -> None:
    """Raises ValueError if --from, which measures nothing, comes with options of a measurement."""
    defaults = {
        "grid": "paper",
        "op": "both",
        "dtype": "bf16",
        "contenders": None,
        "rounds": None,
        "quick": False,
        "host": False,
    }
    if changed := [
        f"--{name}" for name, default in defaults.items() if getattr(arguments, name) != default
    ]:
        raise ValueError(
            f"argument --from: measures nothing, so {', '.join(changed)} would have no effect"
        )


def check_outputs(paths: list[str]) -> None:
    for path in paths:
        if not (folder := Path(path).parent).is_dir():
            raise ValueError(f"{path} could not be written: there is no folder {folder}")
        if Path(path).is_dir():
            raise ValueError(f"{path} could not be written: it is a folder")


def grid_of(name: str) -> Grid:
    if name not in GRIDS:
        raise ValueError(f"argument --grid: {name!r} is none of {', '.join(GRIDS)}")
    return GRIDS[name]


def directions_of(grid: Grid, arguments) -> tuple[str, ...]:
    wanted = tuple(
        direction for direction in grid.directions if arguments.op in ("both", direction)
    )
    if not wanted:
        raise ValueError(
            f"argument --op: grid {arguments.grid} has the {' and '.join(grid.directions)} alone"
        )
    return wanted


def measure(grid: Grid, directions: tuple[str, ...], arguments) -> dict:
    dtype, quick = arguments.dtype, arguments.quick
    rounds = arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    named = arguments.contenders.split(",") if arguments.contenders else None
    chosen = contenders(named, grid.contenders)
    with session():
        result = {
            "header": header(rounds, dtype, chosen),
            "grid": arguments.grid,
            "contenders": {contender.name: contender.label for contender in chosen},
            "throughput": throughput.measure(chosen, grid.part(quick), directions, dtype, rounds),
        }
        if arguments.host:
            result["host"] = host.measure(
                chosen, dtype, host.QUICK_BATCHES if quick else host.BATCHES
            )
    return result
