"""The process that runs the kernels: `python -m fa4_ext.selftest.child DEVICE`.

It reads a kernel's name from each line of standard input, and answers each with a line of JSON on
standard output: {"status": ..., "detail": ...}. The first line, before any kernel, is
{"ready": true} with what is known of the device. After {"status": "failed"} it ends, because the
device may be unusable for this process.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from fa4_ext import _library
from fa4_ext.selftest.attempt import FAILED, Where, attempt


def main(device: int) -> None:
    answers = _take_standard_output()

    def answer(what: dict) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    torch.set_float32_matmul_precision("highest")  # which the truth is computed in
    torch.cuda.set_device(device)
    kernels = _library.manifest()
    by_name = {kernel["name"]: kernel for kernel in kernels}
    where = Where(f"cuda:{device}")
    torch.zeros(1, device=where.device).item()  # CUDA starts, or this raises
    answer({"ready": True, "device": torch.cuda.get_device_name(device)})
    for line in sys.stdin:
        status, detail = attempt(by_name[line.strip()], kernels, where)
        answer({"status": status, "detail": detail})
        if status == FAILED:
            return


def _take_standard_output():
    """Returns a stream of our own to standard output; what others print goes to standard error."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


if __name__ == "__main__":
    main(int(sys.argv[1]))
