"""docs/conformance.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = sorted(
    set(re.findall(r"[\w/]+\.py(?:::\w+)+", (ROOT / "docs" / "conformance.md").read_text()))
)


def names_in(path: Path) -> set[str]:
    """Returns `test` and `Class::test` of a file's functions."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}::{member.name}"
                for member in node.body
                if isinstance(member, ast.FunctionDef)
            }
    return names


def test_the_page_names_tests():
    assert len(NAMED) > 60, NAMED


@pytest.mark.parametrize("name", NAMED)
def test_named_test_exists(name):
    file, _, test = name.partition("::")
    path = ROOT / file if "/" in file else ROOT / "tests" / "gpu" / file
    assert path.is_file(), f"{name}: no file {path.relative_to(ROOT)}"
    assert test in names_in(path), f"{name}: {file} has {sorted(names_in(path))}"


def test_every_gpu_test_file_is_named():
    """A subject that the page forgets is one that nobody finds there."""
    files = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    ours_alone = {
        "test_bench.py",
        "test_disable.py",
        "test_doctor.py",
        "test_fuzz.py",
        "test_profile.py",
        "test_sanitizer.py",
        "test_selftest.py",
        "test_tile_rules.py",
    }
    assert files - {name.partition("::")[0] for name in NAMED} == ours_alone
