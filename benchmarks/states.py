"""Times calls with fa4_ext registered and without it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend

import fa4_ext
from fa4_ext.bench.timing import Prepared, in_turns, prepare, summary

# Without it, a call runs what PyTorch chooses by itself.
STATES = {"without": nullcontext, "registered": fa4_ext.register}


def chosen_backend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments) -> str:
    """Returns the backend that PyTorch chooses for a call of F.scaled_dot_product_attention in the
    state that is in force."""
    chosen = torch._fused_sdp_choice(query, key, value, **arguments)
    return SDPBackend(chosen).name.removesuffix("_ATTENTION").lower()


def prepare_in_each(call: Callable[[int], object], sets: int, target_ms: float) -> dict:
    """Returns the prepared work of each state."""
    return {state: prepare(call, sets, enabled, target_ms) for state, enabled in STATES.items()}


def compare(prepared: dict[str, Prepared], rounds: int, pause_s: float) -> dict:
    """Returns the median microseconds of each state, and as `ratio` the time while registered over
    that without: the median of the rounds' ratios, because within a round both meet the same
    clocks."""
    times = in_turns(prepared, rounds, pause_s)
    pairs = zip(times["registered"], times["without"], strict=True)
    return {f"{state}_us": round(summary(times[state])["ms"] * 1e3, 2) for state in STATES} | {
        "ratio": round(statistics.median(ours / without for ours, without in pairs), 4),
        "captured": all(work.captured for work in prepared.values()),
    }
