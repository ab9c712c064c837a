"""Says which torch the tests run with."""

from __future__ import annotations

import torch

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
HAS_CUDA = torch.version.cuda is not None  # a CUDA build, whether or not there is a GPU
