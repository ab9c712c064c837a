"""A child of the self-test in which some kernels do not do what they should: what a broken kernel
would make of a real device.

python faulty_child.py DEVICE '{"kernel": "hangs" | "is wrong" | "breaks the context"}'
"""

from __future__ import annotations

import json
import sys

import torch

from fa4_ext.selftest import attempt, child

MINUTE = 120_000_000_000  # clock cycles, at 2 GHz
FAULTS = json.loads(sys.argv[2])

right_attempt, right_forward = child.attempt, attempt._forward


def wrong_forward(*arguments) -> dict[str, torch.Tensor]:
    results = right_forward(*arguments)
    results["out"].view(-1)[0] += 0.5
    return results


def faulty_attempt(kernel, kernels, where) -> tuple[str, str]:
    fault = FAULTS.get(kernel["name"])
    if fault == "hangs":
        torch.cuda._sleep(MINUTE)
    if fault == "breaks the context":
        torch.zeros(1, device=where.device)[torch.tensor([9], device=where.device)]
    attempt._forward = wrong_forward if fault == "is wrong" else right_forward
    return right_attempt(kernel, kernels, where)


if __name__ == "__main__":
    child.attempt = faulty_attempt
    child.main(int(sys.argv[1]))
