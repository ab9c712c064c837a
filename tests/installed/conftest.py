"""The tests of the package that need no GPU. They run against whatever `fa4_ext` is found, a checkout's or an installed one, and
import nothing else of the repository: scripts/compat.py copies this folder away and runs it in one environment after another."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the helpers next to this file, under every import mode of pytest


def pytest_report_header():
    import fa4_ext

    return f"fa4_ext: {fa4_ext.__file__}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
