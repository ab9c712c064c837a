"""Checks the package for Hugging Face's Hub without a GPU: `kernels` loads it offline, as it loads
a downloaded one, in the processes of hub_cases.py, where math_ops.py computes its op."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import built
import hub_cases
import pytest

from scripts.hub import build, check

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / ".venv" / "hub"  # requirements/hub.txt, where `make build` installs it


@pytest.fixture(scope="session")
def package(tmp_path_factory) -> Path:
    """Returns the folder of a package's variant. Pytest's workers take turns, because they link in
    one folder."""
    with (built.DIRECTORY.parent / "hub.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build.build(built.SUBSET, tmp_path_factory.mktemp("hub"))


@pytest.fixture
def run(package, tmp_path) -> Callable[..., str]:
    """Returns a function that runs a case, which must pass, and returns what it prints."""
    # The checkout itself would hide `kernels` by the folder of that name.
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in "fa4_ext", "version.txt":
        (packages / name).symlink_to(ROOT / name)
    folders = packages, ROOT / "tests" / "installed"

    def run(case: Callable, *arguments: str | Path) -> str:
        variables = {name: os.environ[name] for name in os.environ if not name.startswith("FA4_")}
        variables |= {
            "CUDA_VISIBLE_DEVICES": "-1", "HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1",
            "LOCAL_KERNELS": f"{hub_cases.REPO}={package}",
            "PYTHONPATH": os.pathsep.join(
                [*map(str, folders), str(KERNELS), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }  # fmt: skip
        command = [sys.executable, hub_cases.__file__, case.__name__, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def namespace(package: Path) -> str:
    (library,) = package.glob("lib*.so")
    return library.stem.removeprefix("lib")


def another_build(package: Path, folder: Path) -> Path:
    """Makes a package whose ops have another namespace of the same length."""
    name = namespace(package)
    renamed = name[:-1] + ("1" if name.endswith("0") else "0")
    shutil.copytree(package, folder)
    (folder / f"lib{name}.so").rename(folder / f"lib{renamed}.so")
    for path in (folder / f"lib{renamed}.so", folder / "metadata.json"):
        content = path.read_bytes()
        assert name.encode() in content, (path, name)
        path.write_bytes(content.replace(name.encode(), renamed.encode()))
    return folder


def test_the_package_can_be_published(package):
    assert check.problems(package.parents[1]) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("README.md", "", "README.md does not belong in it"),
        ("LICENSE", None, "LICENSE is missing"),
        ("_cache.py", None, "_cache.py is missing"),
        ("_ops.py", "from fa4_ext import _library", "_ops.py imports fa4_ext"),
        ("_ops.py", "import torch.nn, einops.layers", "_ops.py imports einops"),
        ("libfa4_ext_0.so", "", "has 2 libraries, expected one"),
    ],
)
def test_a_package_that_can_not_be_published_is_refused(package, tmp_path, name, text, problem):
    shutil.copytree(package, tmp_path / "build" / package.name)
    path = tmp_path / "build" / package.name / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    (found,) = check.problems(tmp_path)
    assert problem in found


def test_the_namespace_depends_on_the_library_and_on_the_modules(tmp_path, monkeypatch):
    library, module = tmp_path / "libfa4_ext.so", tmp_path / "_ops.py"
    monkeypatch.setattr(build, "modules", lambda: [module])
    names = set()
    for of_library, of_module in (b"12", b"1"), (b"1", b"21"), (b"1", b"2"):
        library.write_bytes(of_library)
        module.write_bytes(of_module)
        names.add(build.namespace(library))
    assert len(names) == 3, names


def test_the_metadata_name_what_the_kernels_are_compiled_for(package):
    backend = json.loads((package / "metadata.json").read_text())["backend"]
    expected = [{90: "9.0a", 100: "10.0f"}[arch] for arch in built.ARCHS]
    assert backend == {"type": "cuda", "archs": expected}, backend


def test_kernels_chooses_the_variant_for_cuda_13(run, package):
    run(hub_cases.has_a_variant_for_cuda_13, package.parents[1])


def test_loading_changes_nothing_in_the_dispatcher_but_its_own_ops(run):
    run(hub_cases.changes_its_own_ops_alone)


def test_copies_another_build_and_fa4_ext_live_in_one_process(run, package, tmp_path):
    copy = shutil.copytree(package, tmp_path / "copy")
    run(hub_cases.lives_beside_others, copy, another_build(package, tmp_path / "other"))


def test_a_namespace_that_is_taken_is_named(run, package):
    name = namespace(package)
    text = run(hub_cases.finds_its_namespace_taken, name)
    assert f"PyTorch refused to define the operators {name}::* for {package}" in text, text


def test_the_functions_compute_what_those_of_fa4_ext_compute(run):
    run(hub_cases.computes_what_fa4_ext_computes)


def test_a_llama_of_transformers_computes_what_it_computes_on_sdpa(run):
    run(hub_cases.runs_a_llama_as_sdpa_does)
