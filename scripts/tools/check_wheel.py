"""Checks that a wheel can be published: its tag, files, requirements and size, and its library's
dependencies, exports and hardening. Fails otherwise.

python scripts/tools/check_wheel.py dist/fa4_ext-0.1.0-py3-none-manylinux_2_28_x86_64.whl

auditwheel judges the platform, torch-abi-audit the use of torch.
"""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from elftools.elf.constants import P_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.enums import ENUM_DT_FLAGS, ENUM_DT_FLAGS_1

MAX_BYTES = 30_000_000
PLATFORM = "manylinux_2_28_x86_64"
OLDEST_TORCH = (2, 11)
LIBRARY = "fa4_ext/libfa4_ext.so"
AUTOLOAD = {"fa4_ext": "fa4_ext_autoload:autoload"}
PACKAGE = {
    "fa4_ext_autoload.py",
    "fa4_ext/__init__.py",
    "fa4_ext/py.typed",
    "fa4_ext/bench/__init__.py",
    "fa4_ext/flash_attn/__init__.py",
    "fa4_ext/selftest/__init__.py",
    LIBRARY,
    "fa4_ext/include/fa4_ext.h",
    "fa4_ext/cmake/fa4_ext-config.cmake",
    "fa4_ext/cmake/fa4_ext-config-version.cmake",
}
ALLOWED = (
    rf"fa4_ext/((bench|flash_attn|selftest)/)?\w+\.py|{'|'.join(map(re.escape, PACKAGE))}|"
    r"fa4_ext-[^/]+\.dist-info/.*"
)
# torch has loaded them when our library is loaded.
TORCH_LIBRARIES = {"libtorch.so", "libtorch_cpu.so"}
INTERFACE = "fa4_ext_"
DF_1_NODELETE = 0x8
# These functions of the C library write without a bound. Their checked forms have other names, such
# as __strcpy_chk.
UNCHECKED = {"gets", "sprintf", "stpcpy", "strcat", "strcpy", "vsprintf", "wcscat", "wcscpy"}


def package_problems(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())

        def of_distribution(file: str) -> str:
            return "".join(
                wheel.read(name).decode() for name in names if name.endswith(f".dist-info/{file}")
            )

        metadata, entry_points = of_distribution("METADATA"), of_distribution("entry_points.txt")
    found = [f"{name} is missing" for name in sorted(PACKAGE - names)]
    found += [
        f"{name} does not belong in it" for name in sorted(names) if not re.fullmatch(ALLOWED, name)
    ]
    for notice in ("LICENSE", "THIRD_PARTY_NOTICES.md"):
        if not any(re.fullmatch(rf".*\.dist-info/licenses/{notice}", name) for name in names):
            found.append(f"{notice} is missing")
    groups = configparser.ConfigParser()
    groups.read_string(entry_points)
    if {group: dict(groups[group]) for group in groups.sections()} != {"torch.backends": AUTOLOAD}:
        found.append(f"its entry points are {entry_points!r}, expected torch.backends {AUTOLOAD}")
    if not path.name.endswith(f"-py3-none-{PLATFORM}.whl"):
        found.append(f"its name is not tagged py3-none-{PLATFORM}")
    required = [
        line
        for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
        if "extra ==" not in line
    ]
    if required != ["torch>=2.11"]:
        found.append(f"it requires {required}, expected torch>=2.11 alone")
    if path.stat().st_size > MAX_BYTES:
        found.append(f"it has {path.stat().st_size} bytes, at most {MAX_BYTES} are allowed")
    return found


def tool_json(program: str, *arguments: str | Path) -> dict:
    command = [Path(sysconfig.get_path("scripts"), program), *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def platform_problems(audit: dict) -> list[str]:
    """Returns what is wrong with the platform. `audit` is what `auditwheel show --json` prints."""
    found = []
    symbols = re.fullmatch(r"manylinux_(\d+)_(\d+)_x86_64", audit["sym_tag"])
    allowed = tuple(map(int, re.findall(r"\d+", PLATFORM)[:2]))
    if symbols is None or tuple(map(int, symbols.groups())) > allowed:
        found.append(
            f"its symbols need {audit['sym_tag']}, more than {PLATFORM}: "
            f"{audit['versioned_symbols']}"
        )
    if audit["unsupported_isa"]:
        found.append("it has instructions that not every x86-64 has")
    if foreign := set(audit["external_libs"]) - TORCH_LIBRARIES:
        found.append(
            f"it needs {', '.join(sorted(foreign))}, which neither {PLATFORM} nor torch brings"
        )
    return found


def torch_problems(audit: dict) -> list[str]:
    """Returns what is wrong with the use of torch. `audit` is what `torch-abi-audit --json` prints
    about the library."""
    (library,) = audit["bundled_libs"]
    found = []
    if not library["torch"]["stable"]:
        found.append(f"it leaves torch's stable ABI: {library['torch']['unstable_symbols']}")
    oldest = library["torch"]["min_torch_version"]
    if tuple(map(int, oldest.split(".")[:2])) > OLDEST_TORCH:
        found.append(f"it needs torch {oldest}: {library['torch']['version_defining_symbols']}")
    return found


class Elf(NamedTuple):
    """Holds what a library's file says to the system's loader."""

    segments: list[tuple[str, int]]  # type, flags
    tags: dict[str, int]  # of the dynamic section
    imports: set[str]
    exports: list[str]

    @classmethod
    def read(cls, library: Path) -> Elf:
        with library.open("rb") as file:
            elf = ELFFile(file)
            segments = [
                (segment.header.p_type, segment.header.p_flags) for segment in elf.iter_segments()
            ]
            tags = {
                tag.entry.d_tag: tag.entry.d_val
                for tag in elf.get_section_by_name(".dynamic").iter_tags()
            }
            symbols = [
                symbol
                for symbol in elf.get_section_by_name(".dynsym").iter_symbols()
                if symbol.name
            ]
            imports = {symbol.name for symbol in symbols if symbol.entry.st_shndx == "SHN_UNDEF"}
            exports = [symbol.name for symbol in symbols if symbol.entry.st_shndx != "SHN_UNDEF"]
            return cls(segments, tags, imports, exports)


def library_problems(library: Path) -> list[str]:
    _, tags, _, exports = Elf.read(library)
    found = [f"it has a {tag[3:]}" for tag in sorted(tags.keys() & {"DT_RPATH", "DT_RUNPATH"})]
    if not tags.get("DT_FLAGS_1", 0) & DF_1_NODELETE:
        found.append(
            "dlclose may unload it (no -z nodelete), while torch's dispatcher points into it"
        )
    return found + [
        f"{name} is exported; allowed: {INTERFACE}*"
        for name in exports
        if not name.startswith(INTERFACE)
    ]


def hardening_problems(library: Path) -> list[str]:
    """Returns the hardening that the library lacks; CMakeLists.txt switches it on."""
    found = []
    segments, tags, imports, _ = Elf.read(library)
    if "PT_GNU_RELRO" not in (kind for kind, _ in segments):
        found.append("its relocations stay writable: it has no PT_GNU_RELRO (-z relro)")
    flags, flags_1 = tags.get("DT_FLAGS", 0), tags.get("DT_FLAGS_1", 0)
    if not (
        flags & ENUM_DT_FLAGS["DF_BIND_NOW"]
        or flags_1 & ENUM_DT_FLAGS_1["DF_1_NOW"]
        or "DT_BIND_NOW" in tags
    ):
        found.append(
            "its functions are bound when they are first called, so that their table stays "
            "writable (-z now)"
        )
    stacks = [flags for kind, flags in segments if kind == "PT_GNU_STACK"]
    if not stacks or stacks[0] & P_FLAGS.PF_X:
        found.append("it asks for an executable stack (-z noexecstack)")
    if any(
        kind == "PT_LOAD" and flags & P_FLAGS.PF_W and flags & P_FLAGS.PF_X
        for kind, flags in segments
    ):
        found.append("it has memory that is writable and executable")
    if "DT_TEXTREL" in tags or flags & ENUM_DT_FLAGS["DF_TEXTREL"]:
        found.append("it relocates code, which is writable for that (DT_TEXTREL)")
    if "__stack_chk_fail" not in imports:
        found.append("no function checks its stack frame (-fstack-protector-strong)")
    if unchecked := UNCHECKED & imports:
        found.append(
            f"it calls {', '.join(sorted(unchecked))}, which write without a bound "
            "(_FORTIFY_SOURCE has checked ones)"
        )
    return found


def native_problems(wheel: Path, library: Path) -> list[str]:
    """Returns what is wrong with the library. `wheel` holds it."""
    return [
        *platform_problems(tool_json("auditwheel", "show", "--json", wheel)),
        *torch_problems(tool_json("torch-abi-audit", "--json", library)),
        *library_problems(library),
        *hardening_problems(library),
    ]


def problems(path: Path) -> list[str]:
    if found := package_problems(path):
        return found
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(path) as wheel:
        return native_problems(path, Path(wheel.extract(LIBRARY, directory)))


def main(argument: str) -> int:
    path = Path(argument)
    found = problems(path)
    for problem in found:
        print(f"{path.name}: {problem}", file=sys.stderr)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
