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


def client(folder: Path, body: str = "") -> None:
    """Puts a stand-in for transformers into Python's path, and for the integration's registration
    one that prints."""
    package = folder / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "modeling_utils.py").write_text("print('models')\n" + body)


STAND_IN = """
    import sys, types, torch
    integration = types.ModuleType("fa4_ext.integrations.transformers")
    integration.register = lambda: print("registered")
    sys.modules[integration.__name__] = integration
    import fa4_ext.integrations
    fa4_ext.integrations.transformers = integration
"""


def test_transformers_is_registered_with_when_its_models_are_imported(started, folder):
    client(folder)
    result = started(
        STAND_IN
        + """
    assert not [name for name in sys.modules if name.startswith("transformers")]
    import transformers
    print("package")
    from transformers import modeling_utils
    assert type(modeling_utils.__spec__.loader).__name__ == "SourceFileLoader"
    import transformers.modeling_utils
    """,
        FA4_EXT_AUTOLOAD="1",
    )
    assert result.stdout.split() == ["package", "models", "registered"]
    assert result.stderr == ""


def test_models_that_import_torch_themselves_are_registered_with_later(started, folder):
    """The entry point then runs in the middle of their import."""
    client(folder, "import torch\nprint('models end')\n")
    code = STAND_IN.replace(", torch", "").replace("import fa4_ext.integrations\n", "")
    result = started(
        code.replace("fa4_ext.integrations.transformers = integration", "")
        + """
    import transformers.modeling_utils
    import wave
    """,
        FA4_EXT_AUTOLOAD="1",
    )
    assert result.stdout.split("\n") == ["models", "models end", "registered", ""]
    assert result.stderr == ""


def test_a_registration_that_fails_is_a_warning_and_the_client_goes_on(started, folder):
    client(folder)
    result = started(
        STAND_IN
        + """
    integration.register = lambda: 1 / 0
    import transformers.modeling_utils
    print("on")
    """,
        FA4_EXT_AUTOLOAD="1",
    )
    assert result.stdout.split() == ["models", "on"]
    assert "could not register with transformers, which goes on without it" in result.stderr
    assert "ZeroDivisionError" in result.stderr


def test_a_client_that_fails_fails_as_without_us(started, folder):
    client(folder, "raise LookupError('its own')\n")
    result = started(
        STAND_IN
        + """
    try:
        import transformers.modeling_utils
    except LookupError as error:
        print(error)
    """,
        FA4_EXT_AUTOLOAD="1",
    )
    assert result.stdout.split("\n") == ["models", "its own", ""] and result.stderr == ""


def test_an_import_alone_leaves_clients_alone(started, folder):
    client(folder)
    result = started("import fa4_ext, transformers.modeling_utils", FA4_EXT_AUTOLOAD="0")
    assert result.stdout.split() == ["models"] and result.stderr == ""
