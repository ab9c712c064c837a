"""A torch, a driver or a library that the kernels can't run with: a clear sentence, and never a
failed import."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from packages import PACKAGE, command, copy_package, preamble
from processes import run

from fa4_ext import _elf, _environment
from fa4_ext._environment import Facts

FITTING = Facts(torch="2.13.0+cu130", torch_cuda="13.0", driver=13000, devices=((9, 0), (10, 3)))


def facts(**different) -> Facts:
    return Facts(**{**vars(FITTING), **different})


@pytest.mark.parametrize(
    "fitting",
    [
        FITTING,
        facts(torch="2.11.0"),
        facts(torch="2.11.0a0+git1234567"),
        facts(torch="3.0.0.dev20270101"),
        facts(driver=13020, torch_cuda="13.2"),
        facts(torch_cuda="12.8"),  # a remark
        facts(torch_cuda="14.0", driver=14000),
        facts(devices=None),
    ],
)
def test_what_fits_is_no_problem(fitting):
    assert _environment.problems(fitting) == [] == _environment.surprises(fitting)


@pytest.mark.parametrize(
    ("different", "words"),
    [
        (
            {"torch": "2.10.0"},
            ("torch 2.10.0 is too old", "torch 2.11 or newer", "its native library stays unloaded"),
        ),
        (
            {"torch": "1.13.1+cu117"},
            ("torch 1.13.1+cu117 is too old", "torch 2.11 or newer", "PyTorch's own kernels"),
        ),
        (
            {"torch": "2.13.0+cpu", "torch_cuda": None},
            ("built without CUDA", "need a CUDA build", "no tensor gets to a GPU"),
        ),
        (
            {"driver": None},
            ("no CUDA driver, libcuda.so.1", "CUDA 13.0 or newer", "no tensor gets to a GPU"),
        ),
        (
            {"driver": 12090},
            ("is for CUDA 12.9", "CUDA 13.0 or newer", "every call runs PyTorch's own kernels"),
        ),
        (
            {"driver": 12080, "torch_cuda": "12.8"},
            ("is for CUDA 12.8", "NVIDIA driver 580 or newer", "PyTorch's own kernels"),
        ),
        (
            {"devices": ()},
            (
                "this process sees no GPU",
                "compute capability 9.0, 10.0 or 10.3",
                "none of them runs",
            ),
        ),
        (
            {"devices": ((9, 0), (8, 0))},
            ("GPU 1 is of compute capability 8.0", "10.0 or 10.3", "PyTorch's own kernels"),
        ),
    ],
)
def test_a_problem_says_what_is_what_is_needed_and_what_happens_until_then(different, words):
    (sentence,) = _environment.problems(facts(**different))
    assert all(word in sentence for word in words), sentence
    assert _environment.surprises(facts(**different)) == [sentence]


def test_nothing_is_surprising_where_nothing_is_meant_to_use_cuda():
    nothing = facts(torch_cuda=None, driver=None, devices=())
    assert len(_environment.problems(nothing)) == 2
    assert _environment.surprises(nothing) == []


def test_a_torch_for_cuda_12_is_a_remark():
    (sentence,) = _environment.remarks(facts(torch="2.13.0+cu128", torch_cuda="12.8"))
    assert "torch 2.13.0+cu128 is built for CUDA 12.8" in sentence and "CUDA 13 only" in sentence
    assert _environment.remarks(FITTING) == _environment.remarks(facts(torch_cuda=None)) == []


@pytest.mark.parametrize("word", ["0", "false", "no", "off", "1", "true", "yes", "on"])
@pytest.mark.parametrize(
    "written", [str, str.upper, str.title, "  {}".format, "{} \t".format, " {}\n".format]
)
def test_a_setting_of_the_import_may_be_written_in_any_case_with_spaces(written, word):
    assert _environment.autoregister(written(word)) == (word in ("1", "true", "yes", "on"), None)


@pytest.mark.parametrize("value", [None, "", " ", "\t"])
def test_the_import_registers_without_a_setting(value):
    assert _environment.autoregister(value) == (True, None)


@pytest.mark.parametrize(
    "value", ["2", "00", "-1", "nope", "offf", "0 1", "n", "None", "false;", "ноль"]
)
def test_a_setting_that_is_not_known_is_named_with_what_is_allowed(value):
    wanted, sentence = _environment.autoregister(value)
    assert wanted
    assert all(
        word in sentence
        for word in ("FA4_EXT_AUTOREGISTER", repr(value), "0, false, no, off", "1, true, yes, on")
    ), sentence


# What follows runs in processes of their own, in which something is other than it should be.

OLD_TORCH = "import torch\ntorch.__version__ = torch.torch_version.TorchVersion('2.10.0')\n"
UNUSABLE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fa4_ext
(warning,) = caught
assert warning.category is RuntimeWarning and warning.filename == "<string>", warning
sentence = str(warning.message)
assert fa4_ext.default_handle is None and fa4_ext.__version__
assert "registered at fa4_ext:" not in torch._C._dispatch_dump("aten::_flash_attention_forward")
query = torch.empty(1, 2, 8, 64, dtype=torch.bfloat16, device="meta")
ways = (
    fa4_ext.register, fa4_ext.kernels, fa4_ext.build_info,
    lambda: torch.nn.attention.activate_flash_attention_impl("FA4_EXT"),
    lambda: fa4_ext.explain(query, query, query, device_capability=(9, 0)),
)
for way in ways:
    try:
        way()
    except RuntimeError as error:
        assert str(error) == sentence, error
    else:
        raise AssertionError(way)
print(sentence)
"""


def test_with_a_torch_that_is_too_old_the_import_warns_and_everything_else_raises():
    code = OLD_TORCH + UNUSABLE + "assert 'libfa4_ext' not in open('/proc/self/maps').read()"
    assert "torch 2.10.0 is too old: fa4_ext needs torch 2.11 or newer" in run(code).stdout


def test_with_a_torch_whose_ops_have_more_arguments_the_import_warns_and_registers_nothing():
    code = """
        import torch
        from types import SimpleNamespace

        schema = torch.ops.aten._flash_attention_forward.default._schema
        more = SimpleNamespace(arguments=[*schema.arguments, None])
        changed = SimpleNamespace(default=SimpleNamespace(_schema=more))
        torch.ops.aten._flash_attention_forward = changed
        import fa4_ext

        assert fa4_ext.default_handle is None
        try:
            fa4_ext.register()
        except RuntimeError as error:
            print(error)
    """
    result = run(code)
    assert "RuntimeWarning: torch " in result.stderr
    assert "arguments for _flash_attention_forward, fa4_ext knows 15 or 17" in result.stdout


def test_with_a_torch_of_before_the_registry_of_providers_the_import_warns():
    no_registry = (
        "import torch.nn.attention\ndel torch.nn.attention.register_flash_attention_impl\n"
    )
    result = run(OLD_TORCH + no_registry + "import fa4_ext")
    assert (
        "RuntimeWarning: torch 2.10.0 is too old" in result.stderr
        and "Traceback" not in result.stderr
    )


def compile_library(source: str, target: Path, *options: str) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    target.with_suffix(".cpp").write_text(source)
    subprocess.run(
        ["c++", "-shared", "-fPIC", *options, "-o", target, target.with_suffix(".cpp")], check=True
    )


def not_a_library(target: Path) -> str:
    target.write_text("half a file")
    return "could not be loaded beside torch"


def library_of_another_torch(target: Path) -> str:
    source = (
        'extern "C" void aoti_torch_of_another_time();\nextern "C" void fa4_ext_remove() { '
        "aoti_torch_of_another_time(); }\n"
    )
    compile_library(source, target, "-Wl,-z,now")
    return "undefined symbol: aoti_torch_of_another_time"


def library_of_another_version(target: Path) -> str:
    compile_library('extern "C" int fa4_ext_register() { return 0; }\n', target)
    return "undefined symbol: fa4_ext_set_option"


@pytest.mark.parametrize(
    "make", [not_a_library, library_of_another_torch, library_of_another_version]
)
def test_with_a_library_that_fails_to_load_the_import_warns_and_everything_else_raises(
    make, tmp_path
):
    words = make(copy_package(tmp_path, library=False) / "libfa4_ext.so")
    sentence = run(preamble(tmp_path) + "import torch\n" + UNUSABLE).stdout
    until = (
        "Until fa4_ext is installed anew, or in a checkout built anew by `make build`, every call "
        "runs PyTorch's own kernels."
    )
    assert words in sentence and until in sentence


WHOLE = (PACKAGE / "libfa4_ext.so").stat().st_size


@pytest.mark.parametrize(
    "length",
    [0, 1, 63, 64, 500, 4096, WHOLE // 4, WHOLE // 2, WHOLE * 3 // 4, WHOLE - 4096, WHOLE - 1],
    ids=str,
)
def test_a_library_that_is_cut_off_is_named_with_its_length(length, tmp_path):
    library = tmp_path / "libfa4_ext.so"
    with (PACKAGE / library.name).open("rb") as file:
        library.write_bytes(file.read(length))
    with pytest.raises(OSError) as error:
        _elf.check_whole(library)
    rest = f" of {WHOLE}: its end is missing" if length >= 64 else ", fewer than any library"
    assert str(error.value) == f"{library} has {length} bytes{rest}"


@pytest.mark.parametrize("length", [WHOLE // 2, WHOLE - 1], ids=str)
def test_with_a_library_that_is_cut_off_the_import_warns_and_everything_else_raises(
    length, tmp_path
):
    library = copy_package(tmp_path) / "libfa4_ext.so"
    os.truncate(library, length)
    sentence = run(preamble(tmp_path) + "import torch\n" + UNUSABLE).stdout
    assert (
        f"{library} has {length} bytes of {WHOLE}: its end is missing. Until fa4_ext is installed "
        "anew" in sentence
    ), sentence


def test_a_whole_library_and_other_files_pass_the_check_of_their_length(tmp_path):
    _elf.check_whole(PACKAGE / "libfa4_ext.so")
    other = tmp_path / "other"
    # The loader says what it is.
    other.write_bytes(b"#!/bin/sh\n" * 100)
    _elf.check_whole(other)
    # It has no segments and no sections.
    other.write_bytes(b"\x7fELF\x02\x01" + b"\0" * 58)
    _elf.check_whole(other)


@pytest.mark.parametrize("name", ["demo", "kernels", "status", "doctor"])
def test_commands_without_the_library_say_why_and_show_no_traceback(name, tmp_path):
    not_a_library(copy_package(tmp_path, library=False) / "libfa4_ext.so")
    result = command(name, folders=(tmp_path,))
    assert result.returncode == (0 if name == "status" else 1)
    assert "native library could not be loaded" in (
        result.stdout if name in ("status", "doctor") else result.stderr
    )
    assert "Traceback" not in result.stderr


def driver(folder: Path, version: int, result: int = 0) -> dict[str, str]:
    """Returns the environment of a process that finds a CUDA driver which knows its version and
    nothing else."""
    source = (
        f'extern "C" int cuDriverGetVersion(int* version) {{ *version = {version}; return '
        f"{result}; }}\n"
    )
    compile_library(source, folder / "libcuda.so.1")
    return {"LD_LIBRARY_PATH": str(folder)}


REGISTER = """
import warnings
import fa4_ext
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fa4_ext.register().remove()
    fa4_ext.register().remove()
    torch.nn.attention.activate_flash_attention_impl("FA4_EXT")
assert {(one.category, one.filename) for one in caught} <= {(RuntimeWarning, "<string>")}
assert not torch.cuda.is_initialized()
for warning in caught:
    print(warning.message)
"""


def told(torch_cuda: str | None, **environment: str) -> list[str]:
    """Returns the warnings of three registrations with a torch that is built for `torch_cuda`."""
    result = run(f"import torch\ntorch.version.cuda = {torch_cuda!r}\n" + REGISTER, **environment)
    # The import's own registration says nothing.
    assert result.stderr == ""
    return result.stdout.splitlines()


def no_driver(folder: Path) -> dict[str, str]:
    # CUDA_ERROR_STUB_LIBRARY also hides a driver that this machine has.
    return driver(folder, 0, result=34)


def test_register_tells_once_of_a_missing_driver(tmp_path):
    (sentence,) = told("13.0", **no_driver(tmp_path))
    assert sentence.startswith("fa4_ext.register(): there is no CUDA driver")


def test_register_tells_once_of_a_driver_that_is_too_old(tmp_path):
    (sentence,) = told("12.8", **driver(tmp_path, 12080))
    assert sentence.startswith("fa4_ext.register(): the CUDA driver is for CUDA 12.8")


def test_register_tells_once_of_a_torch_without_cuda_beside_a_driver(tmp_path):
    (sentence,) = told(None, **driver(tmp_path, 13000))
    assert sentence.startswith("fa4_ext.register(): torch ") and "is built without CUDA" in sentence


def test_register_is_silent_where_all_fits_and_where_nothing_is_meant_to_use_cuda(tmp_path):
    assert told("13.0", **driver(tmp_path, 13000)) == []
    assert told("12.8", **driver(tmp_path, 13010)) == []
    assert told(None, **no_driver(tmp_path)) == []


def test_a_warning_that_is_an_error_leaves_nothing_registered(tmp_path):
    run(
        """
        import warnings, torch
        torch.version.cuda = "12.8"
        import fa4_ext
        fa4_ext.default_handle.remove()
        warnings.simplefilter("error")
        for _ in range(2):
            try:
                fa4_ext.register()
            except RuntimeWarning:
                entries = torch._C._dispatch_dump("aten::_flash_attention_forward")
                assert "registered at fa4_ext:" not in entries
            else:
                raise AssertionError
        """,
        **driver(tmp_path, 12080),
    )
