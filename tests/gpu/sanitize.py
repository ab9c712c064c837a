"""A few small calls for compute-sanitizer to watch: sanitize.py forward|backward|fuzz
memcheck|racecheck

racecheck reports backwards that are memcheck's alone, packed ones and those of head dim 256. In
flash-attn-4's packed one the buffer of delta is refilled: the bulk copy, against the reads before
it. Its machine code waits on the full barrier, reads, meets all consumers at a named barrier,
arrives on the empty barrier, and the producer waits on that before it copies; the tool does not
follow the last step there. In ours of head dim 256 a warp writes and reads what it shares with
others, meets at a warp barrier, and one lane arrives for all. ptxas drops the warp barrier of a
converged warp, which runs in step, and the tool then takes the arrival for that lane's alone. The
kernel of groups, which runs most of these packed ones, shares its statistics in the same way; what
the tool reports of it was not looked into.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from calls import deterministic, flash_backward, flash_forward
from cases import DEVICE, HEAD_DIMS, dense, make_inputs, varlen
from fuzz import tensors
from fuzz.case import runs_on_ours
from fuzz.generate import cases
from fuzz.ops import TorchOps, run

import fa4_ext

# On Hopper the forward of so few queries and heads is the decode kernel.
PROBLEMS = [
    dense(65, 200, batch=1, heads=2, heads_kv=2, head_dim=64, is_causal=True),
    dense(130, 65, batch=2, heads=2, heads_kv=1, head_dim=128),
    dense(65, 129, batch=1, heads=2, heads_kv=2, head_dim=72, window=(30, 10)),
    dense(65, 129, batch=1, heads=2, heads_kv=1, head_dim=max(HEAD_DIMS), is_causal=True),
    dense(65, 129, batch=1, heads=2, heads_kv=1, head_dim=192, head_dim_v=128, is_causal=True),
    varlen((1, 65, 0, 130), (70, 65, 3, 130), heads=2, heads_kv=1, head_dim=128, is_causal=True),
    varlen((1, 65, 0), (70, 65, 3), heads=2, heads_kv=1, head_dim=max(HEAD_DIMS), is_causal=True),
]
FORWARD_ALONE = [
    dense(577, 200, batch=1, heads=2, heads_kv=2, head_dim=64, is_causal=True),
    dense(300, 65, batch=2, heads=2, heads_kv=1, head_dim=128),
    dense(577, 129, batch=1, heads=2, heads_kv=2, head_dim=72, window=(30, 10)),
    dense(300, 129, batch=1, heads=2, heads_kv=1, head_dim=max(HEAD_DIMS), is_causal=True),
    varlen((1, 65, 0, 300), (70, 0, 3, 130), heads=2, heads_kv=1, head_dim=128, is_causal=True),
    # This one is decoded without splits.
    dense(3, 200, batch=70, heads=4, heads_kv=2, head_dim=64, window=(30, 10)),
]
# Random calls that our kernels run, small enough for a tool that slows them down a hundred times.
FUZZ_SEED, FUZZ_COUNT, FUZZ_ROWS = 1, 40, 400


def fuzz() -> None:
    ops = TorchOps()
    small = (
        case
        for case in cases(FUZZ_SEED, 2000)
        if sum(case.problem.seqlens_q + case.problem.seqlens_k) <= FUZZ_ROWS
    )
    ours = (
        case
        for case in small
        if runs_on_ours(case, max(HEAD_DIMS)) and not case.fault and case.op != "inplace"
    )
    for case in islice(ours, FUZZ_COUNT):
        inputs = tensors.make_inputs(case, DEVICE)
        outcome = run(
            case,
            inputs,
            tensors.forward_arguments(case, inputs),
            ops,
            lambda: None,
            backward=case.backward,
        )
        if outcome.error:
            raise RuntimeError(f"the {outcome.stage} of {case!r}") from outcome.error


def fixed(direction: str, tool: str) -> None:
    for problem in PROBLEMS + (FORWARD_ALONE if direction == "forward" else []):
        inputs = make_inputs(problem)
        forward = flash_forward(problem, inputs)
        if direction == "backward":
            if tool == "racecheck" and (problem.varlen or problem.head_dim == 256):
                continue
            flash_backward(problem, inputs, forward)
            with deterministic():
                flash_backward(problem, inputs, forward)


def main(what: str, tool: str) -> None:
    fa4_ext.register(fallback="error", speed_rules=False)
    fuzz() if what == "fuzz" else fixed(what, tool)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
