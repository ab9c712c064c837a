"""Runs a kernel as a child of the self-test does, on tensors of the CPU, behind the fake device.

Reads a request from standard input:

    {"kernel": name, "programs": {digest: PTX file}; without them a launch does nothing,
     "capability": int, "multiprocessors": int, "problems": the indices of those to run}

Prints {"status": ..., "detail": ..., "launched": the kernels' entries}.
"""

import ctypes
import json
import sys

import torch

from fa4_ext import _library
from fa4_ext.selftest import attempt
from interpreter.attend import OnCpu
from interpreter.launches import Device


class Begun(OnCpu):
    """Each call is one of its own to the device."""

    def __getattr__(self, name):
        self.device.begin(seed=0, lazy=False)
        return super().__getattr__(name)


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    capability, sm_count = request["capability"], request["multiprocessors"]
    device = Device(request["programs"], sm_count, capability)
    driver = ctypes.CDLL("libcuda.so.1")
    if not request["programs"]:
        ctypes.c_void_p.in_dll(driver, "on_launch").value = None
    problems_for = attempt.problems_for
    attempt.problems_for = lambda kernel: [problems_for(kernel)[i] for i in request["problems"]]
    kernels = _library.manifest()
    (kernel,) = (kernel for kernel in kernels if kernel["name"] == request["kernel"])
    ops, own = Begun(torch.ops.aten, device), Begun(torch.ops.fa4_ext, device)
    where = attempt.Where("cpu", ops, own, capability, sm_count)
    status, detail = attempt.attempt(kernel, kernels, where)
    count = ctypes.c_int.in_dll(driver, "launches").value
    launched = (ctypes.c_char_p * 1024).in_dll(driver, "launched")[:count]
    names = sorted({name.decode() for name in launched})
    print(json.dumps({"status": status, "detail": device.fault or detail, "launched": names}))


if __name__ == "__main__":
    main()
