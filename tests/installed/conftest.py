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
def unregistered():
    """No handle lives before the test. After it none does, and PyTorch is as it was."""
    from torch.nn.attention import _registry

    from fa4_ext import _dispatcher, _register

    def remove_all():
        for handle in list(_register._live):
            handle.remove()

    def pytorch():
        dumps = [torch._C._dispatch_dump(f"aten::{op}") for op in _dispatcher.OPS]
        return dumps, torch._C._get_sdp_priority_order(), dict(_registry._FLASH_ATTENTION_IMPLS)

    remove_all()
    before = pytorch()
    yield
    remove_all()
    assert pytorch() == before


@pytest.fixture
def native_calls(monkeypatch):
    """Returns the list of what the package asks the library for from now on."""
    from fa4_ext import _library

    calls = []
    register, set_option, remove = _library.register, _library.set_option, _library.remove
    monkeypatch.setattr(_library, "register", lambda: calls.append("register") or register())
    monkeypatch.setattr(
        _library, "set_option", lambda *option: calls.append(option) or set_option(*option)
    )
    monkeypatch.setattr(_library, "remove", lambda: calls.append("remove") or remove())
    return calls


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
