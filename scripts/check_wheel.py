"""Fails where a wheel is not what is published: its tag, content, requirement, size, and its library's symbols.

python scripts/check_wheel.py dist/fa4_ext-0.1.0-py3-none-manylinux_2_28_x86_64.whl
"""

import re
import sys
import tempfile
import zipfile
from pathlib import Path

import check_symbols

MAX_BYTES = 30_000_000
PACKAGE = {
    "fa4_ext/__init__.py",
    "fa4_ext/py.typed",
    "fa4_ext/libfa4_ext.so",
    "fa4_ext/include/fa4_ext.h",
    "fa4_ext/cmake/fa4_ext-config.cmake",
    "fa4_ext/cmake/fa4_ext-config-version.cmake",
}
ALLOWED = rf"fa4_ext/\w+\.py|{'|'.join(map(re.escape, PACKAGE))}|fa4_ext-[^/]+\.dist-info/.*"


def problems(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    found = [f"{name} is missing" for name in sorted(PACKAGE - names)]
    found += [f"{name} does not belong in it" for name in sorted(names) if not re.fullmatch(ALLOWED, name)]
    for notice in ("LICENSE", "THIRD_PARTY_NOTICES.md"):
        if not any(re.fullmatch(rf".*\.dist-info/licenses/{notice}", name) for name in names):
            found.append(f"{notice} is missing")
    if not path.name.endswith("-py3-none-manylinux_2_28_x86_64.whl"):
        found.append("its name is not tagged py3-none-manylinux_2_28_x86_64")
    required = [line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE) if "extra ==" not in line]
    if required != ["torch>=2.11"]:
        found.append(f"it requires {required}, expected torch>=2.11 alone")
    if path.stat().st_size > MAX_BYTES:
        found.append(f"it has {path.stat().st_size} bytes, at most {MAX_BYTES} are allowed")
    return found


def main(argument: str) -> int:
    path = Path(argument)
    found = problems(path)
    for problem in found:
        print(f"{path.name}: {problem}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(path) as wheel:
        symbols = check_symbols.main(wheel.extract("fa4_ext/libfa4_ext.so", directory))
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    return 1 if found or symbols else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
