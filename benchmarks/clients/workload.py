"""What a workload is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

BACKENDS = ("torch", "flash", "cudnn", "efficient")


@dataclass(frozen=True)
class Place:
    """Where and how large a workload runs.

    Attributes:
        device: of all tensors.
        dtype: of the weights, or of autocast.
        tiny: whether sizes are those of a test, not of a measurement.
    """

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    tiny: bool = False

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def values(self, x):
        """Returns a tensor or a module here, with the values of bfloat16, so that every dtype
        computes with the same numbers."""
        return x.to(torch.bfloat16).to(self.device, self.dtype)

    def normal(self, *shape: int, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.values(torch.randn(shape, generator=generator))


def loss(hidden: torch.Tensor) -> torch.Tensor:
    """Returns a weighted sum of a model's results. A sum of squares would not do: it is the same
    whatever comes out of a last layer that normalises."""
    rows = hidden.flatten(0, -2).float()
    of_row = torch.linspace(-1, 1, rows.shape[0], device=rows.device)
    of_column = torch.arange(rows.shape[1], device=rows.device).sin()
    return (rows * of_row[:, None] * of_column).mean()


Results = dict[str, torch.Tensor]
# Runs one step and returns what is compared with fp32: outputs, and for training gradients.
Step = Callable[[], Results]


@dataclass(frozen=True)
class Workload:
    """A program. `make(implementation, place)` builds it, with the same weights and inputs each
    time, and returns its step.

    Attributes:
        contenders: names of contenders that can run it.
        eager: whether the implementation "eager" computes the reference: transformers' own where a
            model has no other without fa4_ext, a program's where the measured one is no math.
        compiled: whether the step is a compiled program, which chooses its kernels once.
    """

    name: str
    make: Callable[[str, Place], Step]
    contenders: tuple[str, ...] = (*BACKENDS, "import", "fa4_ext")
    eager: bool = False
    compiled: bool = False
