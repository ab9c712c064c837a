"""FA4_EXT_AUTOLOAD: whether `import torch` imports fa4_ext, by an entry point of torch's group."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packages import copy_package
from processes import PACKAGES, run

import fa4_ext_autoload
from fa4_ext import _environment

ENTRY = "fa4_ext_autoload:autoload"
# A checkout has no entry points.
INSTALLED = [entry.value for entry in metadata.entry_points(group="torch.backends", name="fa4_ext")]
OURS = "'registered at fa4_ext:' in torch._C._dispatch_dump('aten::_flash_attention_forward')"
OFF = """
import sys, torch
assert not [name for name in sys.modules if name.partition(".")[0] == "fa4_ext"]
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Returns a folder which, as the first one in Python's path, has the entry point."""
    if not INSTALLED:
        distribution = tmp_path / "fa4_ext-0.0.0.dist-info"
        distribution.mkdir()
        (distribution / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: fa4_ext\nVersion: 0.0.0\n"
        )
        (distribution / "entry_points.txt").write_text(f"[torch.backends]\nfa4_ext = {ENTRY}\n")
    return tmp_path


@pytest.fixture
def started(folder):
    """Returns a function that runs code with the entry point and the settings."""

    def started(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(folder), PACKAGES])
        return run(code, *options, PYTHONPATH=path, **environment)

    return started


def test_an_installed_package_has_the_entry_point():
    assert INSTALLED in ([], [ENTRY])


@pytest.mark.parametrize("value", ["1", "on", " Yes ", "TRUE"])
def test_on_registers_at_import_torch_and_starts_no_cuda(started, value):
    result = started(
        f"""
        import torch, sys
        assert {OURS} and not torch.cuda.is_initialized()
        assert sys.modules["fa4_ext"].default_handle.active
        import fa4_ext
        fa4_ext.default_handle.remove()
        assert not {OURS}
        """,
        FA4_EXT_AUTOLOAD=value,
    )
    assert result.stdout == result.stderr == ""


@pytest.mark.parametrize("value", ["", " ", "0", "False", " no", "OFF"])
def test_off_imports_nothing(started, value):
    result = started(OFF, FA4_EXT_AUTOLOAD=value)
    assert result.stdout == result.stderr == ""


def test_unset_is_off_and_the_entry_point_is_called(started):
    started(OFF + "\nassert 'fa4_ext_autoload' in sys.modules")


def test_torchs_own_switch_turns_it_off(started):
    code = OFF + "\nassert 'fa4_ext_autoload' not in sys.modules"
    started(code, FA4_EXT_AUTOLOAD="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0")


@pytest.mark.parametrize("value", ["2", "maybe", "FA3"])
def test_a_word_that_is_not_allowed_warns_and_is_off(started, value):
    (line,) = [
        line for line in started(OFF, FA4_EXT_AUTOLOAD=value).stderr.splitlines() if "FA4" in line
    ]
    words = ("RuntimeWarning: FA4_EXT_AUTOLOAD", "0, false, no, off", "1, true, yes, on")
    assert all(word in line for word in (*words, repr(value), "is not imported")), line


def test_the_words_are_those_of_the_import_s_own_setting():
    assert (fa4_ext_autoload.OFF, fa4_ext_autoload.ON) == (_environment._OFF, _environment._ON)


@pytest.mark.parametrize("first", ["fa4_ext", "torch"])
def test_whichever_is_imported_first_registers_once(started, first):
    started(
        f"import {first}\nimport torch, fa4_ext\nassert {OURS}\n"
        f"assert fa4_ext._register._live == [fa4_ext.default_handle]\n",
        FA4_EXT_AUTOLOAD="1",
    )


def test_the_import_s_other_settings_keep_their_meaning(started):
    code = f"import torch, fa4_ext\nassert not {OURS} and fa4_ext.default_handle is None"
    started(code, FA4_EXT_AUTOLOAD="1", FA4_EXT_AUTOREGISTER="0")
    code = f"import torch, fa4_ext\nassert {OURS} and fa4_ext.default_handle.provides == ('FA4',)"
    started(code, FA4_EXT_AUTOLOAD="1", FA4_EXT_PROVIDES="FA4")


def test_a_failing_import_warns_and_torch_is_there(started, folder):
    copy_package(folder, library=False)
    result = started("import torch; torch.zeros(1)", FA4_EXT_AUTOLOAD="1")
    sentence = "RuntimeWarning: FA4_EXT_AUTOLOAD=1 could not import fa4_ext: ImportError("
    assert sentence in result.stderr and "native library is missing" in result.stderr, result.stderr


@pytest.mark.parametrize("value", ["1", "maybe"])
def test_where_warnings_are_errors_torch_is_imported_all_the_same(started, folder, value):
    copy_package(folder, library=False)
    # A filter of the command line would meet torch's own warnings, too.
    started(
        "import warnings\nwarnings.simplefilter('error', RuntimeWarning)\n"
        "import torch; torch.zeros(1)",
        FA4_EXT_AUTOLOAD=value,
    )


def test_the_module_imports_nothing_but_os():
    code = (
        "import sys; before = set(sys.modules); import fa4_ext_autoload; "
        "print(*set(sys.modules) - before - {'fa4_ext_autoload'})"
    )
    assert run(code).stdout.split() == []


def test_off_brings_in_no_module(monkeypatch):
    monkeypatch.delenv("FA4_EXT_AUTOLOAD", raising=False)
    before = set(sys.modules)
    fa4_ext_autoload.autoload()
    assert set(sys.modules) == before
