"""A source distribution can be built from, and names its commit where there is no git."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASK_SETUP_PY = (
    "import runpy, setuptools; setuptools.setup = lambda **_: None; "
    "print(runpy.run_path('setup.py')['commit']())"
)


def commit(folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", ASK_SETUP_PY], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "egg_info",
        "--egg-base",
        folder,
        "sdist",
        "--dist-dir",
        folder,
    ]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_it_names_the_commit_that_it_was_packed_from(unpacked):
    assert not (unpacked / ".git").exists()
    assert commit(unpacked) == commit(ROOT)


def test_without_git_and_without_its_file_the_commit_is_unknown(unpacked, tmp_path):
    (tmp_path / "setup.py").write_text((unpacked / "setup.py").read_text())
    assert commit(tmp_path) == "unknown"


def test_it_holds_what_the_build_reads(unpacked):
    measured = ("kernels/speed_rules.csv", "kernels/tile_rules.csv")
    for needed in (
        "CMakeLists.txt",
        "version.txt",
        "fa4_ext_autoload.py",
        "requirements/build.in",
        "requirements/build.txt",
        "csrc/exports.map",
        *measured,
    ):
        assert (unpacked / needed).exists()
    for pattern in ("kernels/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h", "fa4_ext/**/*.py"):
        assert all((unpacked / path.relative_to(ROOT)).exists() for path in ROOT.glob(pattern)), (
            pattern
        )
