"""This module says what torch, the CUDA driver and the devices of the machine offer, and what keeps
the kernels from running."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

import torch

OLDEST_TORCH = (2, 11)
OLDEST_DRIVER = 13000  # CUDA 13.0, as csrc/core/launch/driver.cpp asks for

# Compute capability -> the `arch` of the kernels that run on it, as kernel_arch() in csrc/core/plan
# has it.
ARCHS = {(9, 0): 90, (10, 0): 100, (10, 3): 100}

# The ops that csrc/aten overrides; their arguments and results as csrc/aten/calls.h knows them.
KNOWN = {
    "_scaled_dot_product_flash_attention": ((7,), (9,)),
    "_scaled_dot_product_flash_attention_backward": ((15,), (3,)),
    "_flash_attention_forward": ((15, 17), (5,)),  # torch 2.12 added block_table and num_splits
    "_flash_attention_backward": ((17,), (3,)),
    "_flash_attention_forward_no_dropout_inplace": ((18,), (1,)),  # since torch 2.12
    "_scaled_dot_product_cudnn_attention": ((9,), (9,)),
    "_scaled_dot_product_cudnn_attention_backward": ((16,), (3,)),
    "_cudnn_attention_forward": ((13, 15), (9,)),  # torch 2.14 added seqused_k and block_table
    "_cudnn_attention_backward": ((16,), (3,)),
    "_cudnn_attention_forward_no_dropout_inplace": ((12,), (1,)),  # since torch 2.15
    "_scaled_dot_product_efficient_attention": ((8,), (4,)),
    "_scaled_dot_product_efficient_attention_backward": ((13,), (4,)),
}

_OFF, _ON = ("0", "false", "no", "off"), ("1", "true", "yes", "on")  # of FA4_EXT_AUTOREGISTER

_CAPABILITIES = "compute capability 9.0, 10.0 or 10.3"
_DRIVERS = "CUDA 13.0 or newer, which is NVIDIA driver 580 or newer"


@dataclass(frozen=True)
class Facts:
    torch: str  # torch's version
    torch_cuda: str | None  # the CUDA that torch is built for
    # the newest CUDA that the driver runs, 13000 for 13.0; None without a driver
    driver: int | None
    # compute capabilities of the devices that this process sees; None if it did not look
    devices: tuple[tuple[int, int], ...] | None = None


def gather(devices: bool = False) -> Facts:
    """Returns the facts of this process. Asking for the devices initialises CUDA; the other facts
    leave a process that may fork as it is."""
    return Facts(
        str(torch.__version__), torch.version.cuda, _driver(), _devices() if devices else None
    )


def _driver() -> int | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        # works without cuInit
        failed = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value  # the toolkit's stub of a driver fails


def _devices() -> tuple[tuple[int, int], ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(
        torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())
    )


def torch_version(version: str = str(torch.__version__)) -> tuple[int, int]:
    """Returns major and minor. A version without numbers is somebody's own build of a new torch."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (999, 0)


def torch_too_old(version: str) -> str | None:
    """Returns the sentence about a torch that is too old for the native library, or None."""
    if torch_version(version) >= OLDEST_TORCH:
        return None
    return (
        f"torch {version} is too old: fa4_ext needs torch {'.'.join(map(str, OLDEST_TORCH))} or "
        "newer. Until it is there, its "
        "native library stays unloaded and every call runs PyTorch's own kernels."
    )


def torch_unknown() -> str | None:
    """Returns the sentence about a torch whose ops have arguments or results that
    csrc/aten/calls.cpp does not know, or None."""
    for op, (arguments, results) in KNOWN.items():
        try:
            schema = getattr(torch.ops.aten, op).default._schema
            what, count, known = "arguments", len(schema.arguments), arguments
            if count in known:
                what, count, known = "results", len(schema.returns), results
        # no such op, or this torch does not show its schema; csrc/aten looks again at every call
        except AttributeError:
            continue
        if count not in known:
            expected = " or ".join(map(str, known))
            return (
                f"torch {torch.__version__} has {count} {what} for {op}, fa4_ext knows {expected}: "
                "it needs a newer fa4_ext. Until "
                "it is there, every call runs PyTorch's own kernels."
            )
    return None


def autoregister(value: str | None) -> tuple[bool, str | None]:
    """Returns whether `import fa4_ext` registers with this value of FA4_EXT_AUTOREGISTER, and the
    sentence about a value that is not allowed, or None."""
    word = (value or "").strip().lower()
    if word and word not in _OFF + _ON:
        allowed = ", ".join(_OFF), ", ".join(_ON)
        return (
            True,
            f"FA4_EXT_AUTOREGISTER must be one of {allowed[0]} or one of {allowed[1]}, is "
            f"{value!r}: fa4_ext registers.",
        )
    return word not in _OFF, None


def torch_problem(facts: Facts) -> str | None:
    if problem := torch_too_old(facts.torch):
        return problem
    if facts.torch_cuda is None:
        return (
            f"torch {facts.torch} is built without CUDA: fa4_ext's kernels need a CUDA build. "
            "Until it is there, no tensor gets to "
            "a GPU and no call to these kernels."
        )
    return None


def driver_problem(facts: Facts) -> str | None:
    if facts.driver is None:
        return (
            f"there is no CUDA driver, libcuda.so.1: fa4_ext's kernels need one for {_DRIVERS}. "
            "Until it is there, no tensor gets "
            "to a GPU and no call to these kernels."
        )
    if facts.driver < OLDEST_DRIVER:
        return (
            f"the CUDA driver is for CUDA {cuda_version(facts.driver)}: fa4_ext's kernels need one "
            f"for {_DRIVERS}. Until it is "
            "there, every call runs PyTorch's own kernels."
        )
    return None


def device_problem(index: int, capability: tuple[int, int]) -> str | None:
    if capability in ARCHS:
        return None
    return (
        f"GPU {index} is of compute capability {capability[0]}.{capability[1]}: fa4_ext's kernels "
        f"need {_CAPABILITIES}. Calls on "
        "this GPU run PyTorch's own kernels."
    )


def device_problems(facts: Facts) -> list[str]:
    if facts.devices is None:
        return []
    if not facts.devices:
        return [
            f"this process sees no GPU: fa4_ext's kernels need one of {_CAPABILITIES}. Until there "
            "is one, none of them runs."
        ]
    return [
        problem
        for index, capability in enumerate(facts.devices)
        if (problem := device_problem(index, capability))
    ]


def problems(facts: Facts) -> list[str]:
    """Returns sentences about what keeps the kernels from running: what is there, what is needed,
    and what happens until then."""
    found = [problem for problem in (torch_problem(facts), driver_problem(facts)) if problem]
    no_device_follows = facts.torch_cuda is None or facts.driver is None
    return found if no_device_follows else found + device_problems(facts)


def surprises(facts: Facts) -> list[str]:
    """Returns the problems of a process that is meant to use CUDA, because torch is built for it or
    there is a driver."""
    return [] if facts.torch_cuda is None and facts.driver is None else problems(facts)


def remarks(facts: Facts) -> list[str]:
    """Returns sentences about what should work and was never tried."""
    if facts.torch_cuda is None or int(facts.torch_cuda.partition(".")[0]) >= OLDEST_DRIVER // 1000:
        return []
    return [
        f"torch {facts.torch} is built for CUDA {facts.torch_cuda}: fa4_ext was tried with builds "
        "for CUDA 13 only. Its kernels "
        "call the driver alone, so that driver's version is what counts."
    ]


def driver_too_old() -> bool:
    """Returns whether there is a driver on which our kernels cannot run."""
    driver = _driver()
    return driver is not None and driver < OLDEST_DRIVER


def cuda_version(number: int) -> str:
    """Returns a CUDA version as people write it, 13.0 for 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"
