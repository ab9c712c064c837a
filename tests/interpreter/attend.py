"""Runs attention through the library's ops on tensors of the CPU, behind the fake device, and holds
it to the rule of tests/gpu/compare.py.

Reads a request from standard input:

    {"programs": {digest: PTX file}, "multiprocessors": int, "capability": int,
     "tile": [queries, keys] or null, "decode": as _library.Overrides has it,
     "disable": patterns of kernels' names,
     "calls": [{"problem": {...}, "page_size": int, "cache_rows": of a dense cache, int, or 0,
                "own": whether through this library's own op, bool, "backward": bool,
                "deterministic": bool,
                "seed": int, "beside": rows of NaN before and behind packed sequences, [int, int];
                may be left out}]}

Prints a line a call: what was wrong with it, or null.
"""

import json
import sys

import calls
import cases
import compare
import packed_rows
import torch

import fa4_ext
from fa4_ext import _library
from interpreter.launches import Device

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class OnCpu:
    """The ops of a namespace, as tensors of a GPU would reach their CUDA kernels."""

    def __init__(self, ops, device: Device):
        self.ops, self.device = ops, device

    def __getattr__(self, name):
        op = getattr(self.ops, name).default

        def call(*arguments, **named):
            self.device.add(
                given for given in (*arguments, *named.values()) if isinstance(given, torch.Tensor)
            )
            return op.redispatch(CUDA, *arguments, **named)

        return call


def problem_of(fields: dict) -> cases.Problem:
    fields = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return cases.Problem(**fields | {"dtype": cases.DTYPES[fields["dtype"]]})


def wrong(device: Device, call: dict) -> str | None:
    torch.manual_seed(call["seed"])
    problem = problem_of(call["problem"])
    inputs = cases.make_inputs(problem)
    before, after = call.get("beside", (0, 0))
    counts = sum(problem.seqlens_q), sum(problem.seqlens_k)
    given = packed_rows.amid(inputs, before, after) if before or after else inputs
    device.begin(call["seed"], lazy=call["seed"] % 2 == 1)
    try:
        with calls.deterministic(call["deterministic"]):
            if problem.top_left or problem.bias:
                result = calls.run_cudnn_op(problem, given, backward=call["backward"])
            elif call["cache_rows"]:
                result = calls.own_forward_of_cache(problem, inputs, call["cache_rows"])
            elif call["own"]:
                result = calls.run_own(problem, given, backward=call["backward"])
            elif call["page_size"]:
                result = calls.flash_forward_paged(problem, inputs, call["page_size"])
            else:
                result = calls.run_flash(problem, given, backward=call["backward"])
    except RuntimeError as error:
        return device.fault or str(error)
    try:
        if before or after:
            packed_rows.assert_zero_outside(result, before, *counts)
            result = packed_rows.cut(result, before, *counts)
        compare.assert_matches_reference(problem, inputs, result)
    except AssertionError as error:
        return str(error)
    return None


def main() -> None:
    request = json.load(sys.stdin)
    device = Device(request["programs"], request["multiprocessors"], request["capability"])
    cases.DEVICE, calls.aten = "cpu", OnCpu(torch.ops.aten, device)
    calls.own = OnCpu(torch.ops.fa4_ext, device)
    torch.set_num_threads(1)
    overridden = _library.override(tile=request["tile"] or (0, 0), decode=request["decode"])
    options = {"fallback": "error", "speed_rules": False, "disable": tuple(request["disable"])}
    with overridden, fa4_ext.register(**options):
        for call in request["calls"]:
            print(json.dumps(wrong(device, call)), flush=True)


if __name__ == "__main__":
    main()
