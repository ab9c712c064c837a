"""The tests of the package that need no GPU. They run against whatever `fa4_ext` is found, a
checkout's or an installed one, and import nothing else of the repository: scripts/tools/compat.py
copies this folder away and runs it in one environment after another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# the helpers next to this file, under every import mode of pytest
sys.path.insert(0, str(Path(__file__).parent))


def pytest_report_header():
    import fa4_ext

    return (
        f"fa4_ext: {fa4_ext.__file__}, torch {torch.__version__}, cuDNN "
        f"{torch.backends.cudnn.version()}"
    )


@pytest.fixture
def cuda(monkeypatch):
    """Returns a CUDA that comes up when the test says so. No handle lives before the test, and none
    after it."""
    from fake_cuda import Cuda

    from fa4_ext import _register, _sdpa_order

    for handle in list(_register._live):
        handle.remove()
    original = torch._C._get_sdp_priority_order()
    monkeypatch.setattr(_sdpa_order, "_queued_for", None)
    yield Cuda(monkeypatch)
    for handle in list(_register._live):
        handle.remove()
    torch._C._set_sdp_priority_order(original)


@pytest.fixture
def output(capsys):
    """Returns what a command prints on standard output, in this process; it must succeed."""
    from fa4_ext.__main__ import main

    def output(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    return output


@pytest.fixture
def error(capsys):
    """Returns what a command says about wrong usage."""
    from fa4_ext.__main__ import main

    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit:
            main(list(arguments))
        assert exit.value.code == 2
        return capsys.readouterr().err

    return error
