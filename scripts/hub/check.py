"""Checks that a package for Hugging Face's Hub can be published: its files, what its modules
import, and its library as that of a wheel. Fails otherwise.

python -m scripts.hub.check dist/hub
"""

from __future__ import annotations

import ast
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from scripts.hub import build
from scripts.tools import check_wheel

IMPORTED = {"torch", *sys.stdlib_module_names}


def absolute_imports(module: Path) -> Iterator[str]:
    """Yields the packages that a module imports by an absolute name."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


def package_problems(folder: Path, library: Path) -> list[str]:
    expected = {library.name, "metadata.json", *build.NOTICES}
    expected |= {path.name for path in build.modules()}
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    found = [f"{name} is missing" for name in sorted(expected - names)]
    found += [f"{name} does not belong in it" for name in sorted(names - expected)]
    for module in sorted(folder.glob("*.py")):
        if foreign := set(absolute_imports(module)) - IMPORTED:
            found.append(f"{module.name} imports {', '.join(sorted(foreign))}")
    return found


def library_problems(library: Path) -> list[str]:
    """Returns what `check_wheel` finds about the library, in the wheel that auditwheel asks for."""
    with tempfile.TemporaryDirectory() as directory:
        wheel = Path(directory, f"fa4_ext-0-py3-none-{check_wheel.PLATFORM}.whl")
        with zipfile.ZipFile(wheel, "w") as file:
            file.write(library, library.name)
            file.writestr("fa4_ext-0.dist-info/RECORD", f"{library.name},,\n")
        return check_wheel.native_problems(wheel, library)


def problems(out: Path) -> list[str]:
    folder = out / "build" / build.VARIANT
    libraries = list(folder.glob("libfa4_ext_*.so"))
    if len(libraries) != 1:
        return [f"{folder} has {len(libraries)} libraries, expected one"]
    return package_problems(folder, libraries[0]) or library_problems(libraries[0])


def main(argument: str) -> int:
    found = problems(Path(argument))
    for problem in found:
        print(f"{argument}: {problem}", file=sys.stderr)
    print(f"{argument}: {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
