"""Runs work that several processes share, with one GPU each."""

from __future__ import annotations

import faulthandler
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

import fa4_ext

# In seconds. Starting CUDA and NCCL takes some 15 of them, the work a few.
COLLECTIVE_LIMIT = 60
PROCESS_LIMIT = 150


def _rank(
    rank: int, world: int, meeting_point: str, seed: int, work: Callable, arguments: tuple
) -> None:
    # It says where a rank hangs, and ends it.
    faulthandler.dump_traceback_later(PROCESS_LIMIT, exit=True)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.manual_seed(seed)
    dist.init_process_group(
        "nccl", init_method=f"file://{meeting_point}", rank=rank, world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_LIMIT), device_id=device,
    )  # fmt: skip
    with fa4_ext.register(fallback="error", speed_rules=False):
        work(*arguments)
    dist.destroy_process_group()


def run_ranks(work: Callable, *arguments, seed: int, world: int = 2) -> None:
    """Runs `work(*arguments)` in `world` processes that form the default process group, with ours
    registered without a fallback.

    work: a module's function. Every rank has the same random state, its own GPU as the current
    device. Raises torch.multiprocessing.ProcessRaisedException with the traceback of the rank that
    failed first; the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _rank, (world, str(Path(folder) / "meeting"), seed, work, arguments), nprocs=world
        )
