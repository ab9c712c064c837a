"""Builds the kernels, links libfa4_ext.so and packs the wheel. Needs torch, what
requirements/build.txt lists and a C++17 compiler.

Settings, from the environment:
  FA4_EXT_KERNELS  subset of the kernel matrix: full (default), core, or tuning
  FA4_EXT_ARCHS    90,100 (default), 90 or 100
  FA4_EXT_JOBS     compiling processes; as many as cores by default
  FA4_EXT_CACHE    folder of compiled kernels; ~/.cache/fa4_ext/kernels by default
  FA4_EXT_TESTS    1: also build the pybind11 module that the tests use, into build/tests/
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
CMAKE_FILES = ["cmake/fa4_ext-config.cmake", "cmake/fa4_ext-config-version.cmake"]
# of the package: what CMakeLists.txt installs
NATIVE_FILES = ["libfa4_ext.so", "include/fa4_ext.h", *CMAKE_FILES]
PLATFORM = "manylinux_2_28_x86_64"
NEEDS = (
    "the build needs: pip install --no-deps -r requirements/build.txt && pip install -r "
    "requirements/torch.in"
)
COMMIT = "commit.txt"  # in source distributions only


def setting(name: str, default: str) -> str:
    return os.environ.get(f"FA4_EXT_{name}") or default


def package_folder(name: str) -> Path:
    """Returns where a package is installed, without importing it."""
    spec = find_spec(name)
    if spec is None:
        raise SystemExit(f"{name} is not installed; {NEEDS}")
    return Path(next(iter(spec.submodule_search_locations)))


def script(name: str) -> Path:
    """Returns the path of a program that a package brought into this environment, or into the one
    that an isolated build has on its PATH."""
    path = shutil.which(
        name, path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    )
    if path is None:
        raise SystemExit(f"{name} is not installed; {NEEDS}")
    return Path(path)


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"the C++ compiler {compiler!r} was not found; install one of C++17, on Debian or "
            "Ubuntu with: apt-get install g++"
        )


def commit() -> str:
    """Returns the checkout's commit, with "-dirty" after it if files differ, or else the commit
    that a source distribution was packed from."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = [
            "git",
            "-C",
            ROOT,
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude=*",
        ]
        described = subprocess.run(command, capture_output=True, text=True, check=False)
        if described.returncode == 0:
            return described.stdout.strip()
    packed = ROOT / COMMIT
    return packed.read_text().strip() if packed.exists() else "unknown"


def cuda_headers() -> Path:
    roots = find_spec("nvidia").submodule_search_locations if find_spec("nvidia") else []
    for root in roots:
        if (found := Path(root, "cu13", "include")).joinpath("cuda.h").exists():
            return found
    raise SystemExit(f"cuda.h is not installed; {NEEDS}")


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    if status := subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode:
        raise SystemExit(status)


class BuildNative(build_ext):
    def run(self) -> None:
        check_compiler()
        subset, jobs = (
            setting("KERNELS", "full"),
            setting("JOBS", str(len(os.sched_getaffinity(0)))),
        )
        build = ROOT / "build" / subset
        options = [
            f"--arch={setting('ARCHS', '90,100')}",
            f"--jobs={jobs}",
            f"--out={build / 'kernels'}",
            f"--commit={commit()}",
        ]
        run(sys.executable, "-m", "kernels.build", f"--subset={subset}", *options)
        self.link(build, jobs)

        target = Path("fa4_ext" if self.inplace else Path(self.build_lib, "fa4_ext")).resolve()
        run(script("cmake"), "--install", build / "cmake", "--prefix", target)

    def link(self, build: Path, jobs: str) -> None:
        cmake = script("cmake")
        options = [
            f"-DCMAKE_MAKE_PROGRAM={script('ninja')}",
            f"-DFA4_EXT_KERNELS_DIR={build / 'kernels'}",
            f"-DFA4_EXT_CUDA_INCLUDE_DIR={cuda_headers()}",
            f"-DFA4_EXT_TORCH_DIR={package_folder('torch')}",
        ]
        if setting("TESTS", "0") == "1":
            options += [
                "-DFA4_EXT_TESTS=ON",
                f"-DFA4_EXT_TESTS_DIR={ROOT / 'build' / 'tests'}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={package_folder('pybind11') / 'share' / 'cmake' / 'pybind11'}",
            ]
        run(cmake, "-S", ROOT, "-B", build / "cmake", "-G", "Ninja", *options)
        run(cmake, "--build", build / "cmake", "--parallel", jobs)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, "fa4_ext", name)) for name in NATIVE_FILES]

    def get_source_files(self) -> list[str]:
        return []


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # torch's stable ABI and no Python in it: one library for every CPython
        return "py3", "none", PLATFORM


class Source(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, COMMIT).write_text(commit() + "\n")


setup(
    ext_modules=[Extension("fa4_ext.libfa4_ext", [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel, "sdist": Source},
)
