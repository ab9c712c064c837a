"""Writes a package of fa4_ext.flash_attn in the layout that Hugging Face's `kernels` loads.

python -m scripts.hub.build --kernels core --out dist/hub

It takes what `setup.py build_ext` left in build/core, and links the library once more with a
namespace of its own for the ops. So a package can live in one process with an installed fa4_ext and
with packages of other builds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from kernels.pool import TARGETS

ROOT = Path(__file__).parents[2]
VARIANT = "torch-stable-abi211-cu130-x86_64-linux"
NOTICES = ("LICENSE", "THIRD_PARTY_NOTICES.md")
OWN_NATIVE = Path(__file__).with_name("_native.py")
HASH_DIGITS = 12
# `kernels` asks for a version of the functions' interface, not of the build.
INTERFACE_VERSION = 1


def modules() -> list[Path]:
    """Returns the package's modules: the functions' own, and another one that loads the library."""
    functions = sorted((ROOT / "fa4_ext" / "flash_attn").glob("*.py"))
    return [path for path in functions if path.name != OWN_NATIVE.name] + [OWN_NATIVE]


def namespace(library: Path) -> str:
    """Returns the name of the ops' namespace, with a hash of all that decides what they do.

    library: the wheel's.
    """
    digest = hashlib.sha256()
    for path in (library, *modules()):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"fa4_ext_{digest.hexdigest()[:HASH_DIGITS]}"


def cmake(*arguments: str | Path) -> None:
    command = [Path(sysconfig.get_path("scripts"), "cmake"), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def link(build: Path) -> Path:
    """Returns the library with a namespace of its own."""
    cmake("--build", build, "--target", "fa4_ext")
    name = namespace(build / "libfa4_ext.so")
    cmake(f"-DFA4_EXT_HUB_NAMESPACE={name}", build)
    cmake("--build", build, "--target", "fa4_hub")
    return build / f"lib{name}.so"


def capabilities(kernels: Path) -> list[str]:
    """Returns what the kernels are compiled for, as `kernels` writes it: 9.0a, 10.0f."""
    archs = {row["arch"] for row in json.loads((kernels / "manifest.json").read_text())}
    return [re.sub(r"sm_(\d+)(\d)(\w)", r"\1.\2\3", TARGETS[arch]) for arch in sorted(archs)]


def metadata(name: str, kernels: Path) -> dict:
    return {
        "id": name,  # `kernels` gives the module this name
        "name": "fa4-ext",
        "version": INTERFACE_VERSION,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": "cuda", "archs": capabilities(kernels)},
    }


def write(library: Path, kernels: Path, out: Path) -> Path:
    """Writes the package's variant, in place of what was there, and returns its folder."""
    folder = out / "build" / VARIANT
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in (library, *modules(), *(ROOT / notice for notice in NOTICES)):
        shutil.copyfile(path, folder / path.name)
    text = json.dumps(metadata(library.stem.removeprefix("lib"), kernels), indent=2)
    (folder / "metadata.json").write_text(text + "\n")
    return folder


def build(subset: str, out: Path) -> Path:
    folder = ROOT / "build" / subset
    return write(link(folder / "cmake"), folder / "kernels", out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", default="full", metavar="SUBSET", help="the subset to link")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    arguments = parser.parse_args()
    print(build(arguments.kernels, arguments.out))


if __name__ == "__main__":
    main()
