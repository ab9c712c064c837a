"""The gates of `make wheel` notice what they are for."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path

import built
import pytest

import fa4_ext
from scripts.tools import check_wheel

ROOT = Path(__file__).parent.parent
NAME = "fa4_ext-0.1.0-py3-none-manylinux_2_28_x86_64.whl"
INFO = "fa4_ext-0.1.0.dist-info"
CONTENT = {
    **dict.fromkeys(check_wheel.PACKAGE, ""), "fa4_ext/_library.py": "", f"{INFO}/RECORD": "",
    f"{INFO}/METADATA": "Name: fa4_ext\nRequires-Dist: torch>=2.11\n",
    f"{INFO}/entry_points.txt": "[torch.backends]\nfa4_ext = fa4_ext_autoload:autoload\n",
    f"{INFO}/licenses/LICENSE": "",
    f"{INFO}/licenses/THIRD_PARTY_NOTICES.md": "",
}  # fmt: skip


def wheel(folder: Path, content: dict[str, str], name: str = NAME) -> Path:
    with zipfile.ZipFile(folder / name, "w") as file:
        for path, text in content.items():
            file.writestr(path, text)
    return folder / name


def test_a_wheel_as_it_should_be_passes(tmp_path):
    assert check_wheel.package_problems(wheel(tmp_path, CONTENT)) == []


@pytest.mark.parametrize(
    ("change", "name", "problem"),
    [
        ({"kernels/matrix.py": ""}, NAME, "kernels/matrix.py does not belong in it"),
        (
            {"fa4_ext/include/internal.h": ""},
            NAME,
            "fa4_ext/include/internal.h does not belong in it",
        ),
        ({"fa4_ext/libfa4_ext.so": None}, NAME, "fa4_ext/libfa4_ext.so is missing"),
        ({"fa4_ext/include/fa4_ext.h": None}, NAME, "fa4_ext/include/fa4_ext.h is missing"),
        (
            {"fa4_ext/cmake/fa4_ext-config.cmake": None},
            NAME,
            "fa4_ext/cmake/fa4_ext-config.cmake is missing",
        ),
        ({f"{INFO}/licenses/LICENSE": None}, NAME, "LICENSE is missing"),
        ({"fa4_ext_autoload.py": None}, NAME, "fa4_ext_autoload.py is missing"),
        ({f"{INFO}/entry_points.txt": None}, NAME, "its entry points are ''"),
        (
            {f"{INFO}/entry_points.txt": "[torch.backends]\nfa4_ext = fa4_ext:register\n"},
            NAME,
            "fa4_ext = fa4_ext:register",
        ),
        (
            {f"{INFO}/METADATA": "Requires-Dist: torch>=2.11\nRequires-Dist: numpy\n"},
            NAME,
            "expected torch>=2.11 alone",
        ),
        ({}, "fa4_ext-0.1.0-py3-none-linux_x86_64.whl", "not tagged"),
    ],
    ids=[
        "extra",
        "extra_header",
        "no_library",
        "no_header",
        "no_cmake",
        "no_licence",
        "no_autoload",
        "no_entry_point",
        "other_entry_point",
        "requirement",
        "tag",
    ],
)
def test_a_wheel_that_is_not_is_refused(tmp_path, change, name, problem):
    content = {path: text for path, text in (CONTENT | change).items() if text is not None}
    assert any(
        problem in found for found in check_wheel.package_problems(wheel(tmp_path, content, name))
    )


AUDIT = {
    "sym_tag": "manylinux_2_24_x86_64", "unsupported_isa": False, "versioned_symbols": {},
    "external_libs": {"libtorch.so": None, "libtorch_cpu.so": None},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"sym_tag": "manylinux_2_34_x86_64"},
            "its symbols need manylinux_2_34_x86_64, more than manylinux_2_28_x86_64",
        ),
        ({"sym_tag": "linux_x86_64"}, "its symbols need linux_x86_64"),
        ({"unsupported_isa": True}, "instructions that not every x86-64 has"),
        (
            {"external_libs": {"libtorch.so": None, "libcudart.so.13": None}},
            "it needs libcudart.so.13",
        ),
    ],
    ids=["symbols", "no_policy", "instructions", "library"],
)
def test_what_auditwheel_finds_is_named(change, problem):
    assert check_wheel.platform_problems(AUDIT) == []
    (found,) = check_wheel.platform_problems(AUDIT | change)
    assert problem in found


def test_what_leaves_torch_s_stable_interface_is_named():
    found = {
        "stable": False,
        "unstable_symbols": ["c10::Error"],
        "min_torch_version": "2.13",
        "version_defining_symbols": ["new"],
    }
    library = {"torch": found}
    assert check_wheel.torch_problems({"bundled_libs": [library]}) == [
        "it leaves torch's stable ABI: ['c10::Error']", "it needs torch 2.13: ['new']",
    ]  # fmt: skip


def test_the_built_library_keeps_to_torch_s_stable_interface_and_exports_its_own():
    library = Path(fa4_ext.__file__).with_name("libfa4_ext.so")
    assert (
        check_wheel.torch_problems(check_wheel.tool_json("torch-abi-audit", "--json", library))
        == []
    )
    assert check_wheel.library_problems(library) == []


def test_the_built_library_is_hardened():
    assert check_wheel.hardening_problems(Path(fa4_ext.__file__).with_name("libfa4_ext.so")) == []


def test_every_source_of_the_library_is_compiled_with_checks():
    ninja = (built.DIRECTORY.parent / "cmake" / "build.ninja").read_text()
    flags = dict(
        re.findall(
            r"^build CMakeFiles/(?:fa4_\w+)\.dir/(csrc/\S+)\.o: .*?\n  FLAGS = (.*?)$",
            ninja,
            re.MULTILINE | re.DOTALL,
        )
    )
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/*.cpp")}
    assert sources <= set(flags), sources - set(flags)
    for source, given in flags.items():
        assert "-fstack-protector-strong" in given and re.search(
            "-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=[23]", given
        ), (source, given)


HARDENED = (
    "-O2",
    "-fstack-protector-strong",
    "-D_FORTIFY_SOURCE=2",
    "-Wl,-z,relro,-z,now,-z,noexecstack",
)
COPIES = """
#include <string.h>
void use(char*);
void copy(const char* from) { char frame[64]; strcpy(frame, from); use(frame); }
#ifdef WRITABLE_CODE
__attribute__((section("code,\\"awx\\",@progbits#"))) void written(void) {}
#endif
#ifdef ADDRESS_IN_CODE
__asm__(".text\\n.quad copy");
#endif
"""


def small_library(folder: Path, *flags: str) -> Path:
    """Returns one with a function that copies into its frame."""
    (folder / "copies.c").write_text(COPIES)
    command = ["cc", "-shared", "-fPIC", *flags, "-o", folder / "library.so", folder / "copies.c"]
    subprocess.run(command, check=True)
    return folder / "library.so"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ((), None),
        (("-Wl,-z,norelro",), "it has no PT_GNU_RELRO"),
        (("-Wl,-z,lazy",), "bound when they are first called"),
        (("-Wl,-z,execstack",), "an executable stack"),
        (("-DWRITABLE_CODE",), "memory that is writable and executable"),
        (("-DADDRESS_IN_CODE", "-Wl,-z,notext"), "it relocates code"),
        (("-fno-stack-protector",), "no function checks its stack frame"),
        (("-U_FORTIFY_SOURCE",), "it calls strcpy, which write without a bound"),
    ],
    ids=[
        "hardened",
        "no_relro",
        "lazy",
        "stack",
        "writable_code",
        "relocated_code",
        "no_protector",
        "no_fortify",
    ],
)
def test_what_a_library_lacks_of_protection_is_named(tmp_path, flags, problem):
    found = check_wheel.hardening_problems(small_library(tmp_path, *HARDENED, *flags))
    assert found == [] if problem is None else any(problem in line for line in found), found


def test_another_library_s_exports_and_rpath_are_named():
    import torch

    found = check_wheel.library_problems(Path(torch.__file__).parent / "lib" / "libtorch_python.so")
    assert any("is exported; allowed: fa4_ext_*" in problem for problem in found)
    assert any(problem in ("it has a RPATH", "it has a RUNPATH") for problem in found)
    assert (
        "dlclose may unload it (no -z nodelete), while torch's dispatcher points into it" in found
    )
