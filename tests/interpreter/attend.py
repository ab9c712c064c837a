"""Attention through the library's ops on tensors of the CPU, behind the fake device, held to the rule of tests/gpu/compare.py.

Reads a request from standard input:

    {"programs": {digest: PTX file}, "multiprocessors": int, "capability": int, "tile": [queries, keys] or null,
     "decode": as force_decode takes it,
     "calls": [{"problem": {...}, "backward": bool, "deterministic": bool, "seed": int}]}

Prints a line a call: what was wrong with it, or null.
"""

import json
import sys

import calls
import cases
import compare
import torch

import fa4_ext
from fa4_ext import _library
from interpreter.launches import Device

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class OnCpu:
    """torch.ops.aten, as tensors of a GPU would reach the overrides."""

    def __getattr__(self, name):
        op = getattr(torch.ops.aten, name).default
        return lambda *arguments, **named: op.redispatch(CUDA, *arguments, **named)


def problem_of(fields: dict) -> cases.Problem:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return cases.Problem(**fields | {"dtype": cases.DTYPES[fields["dtype"]]})


def wrong(device: Device, call: dict) -> str | None:
    torch.manual_seed(call["seed"])
    problem = problem_of(call["problem"])
    inputs = cases.make_inputs(problem)
    device.begin([t for t in vars(inputs).values() if t is not None], call["seed"], lazy=call["seed"] % 2 == 1)
    try:
        with calls.deterministic(call["deterministic"]):
            result = calls.run_flash(problem, inputs, backward=call["backward"])
    except RuntimeError as error:
        return device.fault or str(error)
    try:
        compare.assert_matches_reference(problem, inputs, result)
    except AssertionError as error:
        return str(error)
    return None


def main() -> None:
    request = json.load(sys.stdin)
    device = Device(request["programs"], request["multiprocessors"], request["capability"])
    cases.DEVICE, calls.aten = "cpu", OnCpu()
    torch.set_num_threads(1)
    _library.force_decode(request["decode"])
    if request["tile"]:
        _library.force_tile(*request["tile"])
    with fa4_ext.register(fallback="error", speed_rules=False):
        for call in request["calls"]:
            print(json.dumps(wrong(device, call)), flush=True)


if __name__ == "__main__":
    main()
