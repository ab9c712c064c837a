"""The lists of packages: every one in one version, and each of its files by a hash."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# compat.in has no hashes: it lists versions of one package.
LISTS = sorted(path.stem for path in (ROOT / "requirements").glob("*.txt"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted(name: str) -> dict[str, Requirement]:
    """Returns the requirements of a list without hashes, by name."""
    lines = (
        line.partition("#")[0].strip()
        for line in (ROOT / "requirements" / f"{name}.in").read_text().splitlines()
    )
    return {normal(found.name): found for found in map(Requirement, filter(None, lines))}


def hashed(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Returns those of a list with hashes, by name."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ")
    lines = [
        line
        for line in text.splitlines()
        if line.strip() and not line.startswith(("#", "--only-binary"))
    ]
    found = {}
    for line in lines:
        requirement, *hashes = line.split(" --hash=")
        parsed = Requirement(requirement.strip())
        found[normal(parsed.name)] = parsed, [hash.strip() for hash in hashes]
    return found


PINNED = {name: requirement for listed in LISTS for name, requirement in wanted(listed).items()}


@pytest.mark.parametrize("name", LISTS)
def test_every_package_is_pinned_to_one_version_and_to_hashes_of_its_files(name):
    assert hashed(name), f"requirements/{name}.txt lists nothing"
    for package, (requirement, hashes) in hashed(name).items():
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), (
            f"{package}: {requirement.specifier} is no version"
        )
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", hash) for hash in hashes), (
            package,
            hashes,
        )


@pytest.mark.parametrize("name", LISTS)
def test_the_hashes_are_of_the_versions_that_are_wanted(name):
    """`make lock` renews them."""
    found = {package: str(requirement) for package, (requirement, _) in hashed(name).items()}
    assert found == {
        package: str(Requirement(f"{package}{_extras(r)}{r.specifier}"))
        for package, r in wanted(name).items()
    }


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def test_no_package_is_in_two_lists():
    assert sum(len(wanted(name)) for name in LISTS) == len(PINNED)


@pytest.mark.parametrize(
    "package", sorted({**wanted("torch"), **wanted("build"), **wanted("test")})
)
def test_what_a_package_needs_is_listed_too(package):
    """pip is told not to look for it."""
    try:
        needs = requires(package) or []
    except PackageNotFoundError:
        pytest.skip("not installed")
    for need in map(Requirement, needs):
        extras = ("", *PINNED[package].extras)
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
            pinned = PINNED.get(normal(need.name))
            assert pinned, f"{package} needs {need}, which no list has"
            (pin,) = pinned.specifier
            assert need.specifier.contains(pin.version, prereleases=True), (
                f"{package} needs {need}, {pinned} is listed"
            )


def test_the_library_of_this_environment_is_compiled_with_the_pinned_torch():
    (pin,) = PINNED["torch"].specifier
    assert version("torch").partition("+")[0] == pin.version


def test_what_installs_a_list_asks_for_its_hashes():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^INSTALL := .*--require-hashes", makefile, re.MULTILINE)
    for line in makefile.splitlines():
        assert "pip install" not in line or line.startswith("INSTALL :="), f"without hashes: {line}"
