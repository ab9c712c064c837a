"""Compiled objects by content, outside the clone.

An entry is an object and, written after it, a JSON file of facts with the object's hash. Both appear by a rename within one file
system, so a build that is killed, or two at once, leave whole entries or none; a damaged one fails its hash and is compiled again.
"""

import ast
import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from kernels.matrix import Kernel

PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")
SECONDS_ABANDONED = 24 * 3600  # a temporary folder this old belongs to a build that was killed


def default_directory() -> Path:
    if chosen := os.environ.get("FA4_EXT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "fa4_ext", "kernels")


def source_versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def sources(kernel: Kernel, root: Path) -> list[Path]:
    """The files that decide what is compiled: the entry and what it imports. matrix.py's part is the spec itself."""
    found = {root / name for name in ("worker.py", "header.py", "cubin.py")}  # the readers of the facts
    left = [root / f"{kernel.module}.py"]
    while left:
        found.add(path := left.pop())
        left += set(imports(path, root)) - found - {root / "matrix.py"}
    return sorted(found)


def imports(path: Path, root: Path) -> list[Path]:
    """The files below kernels/ that a file imports, all of them by `from kernels...`."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    statements = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    if any(name.split(".")[0] == "kernels" for name in plain) or any(statement.level for statement in statements):
        raise ValueError(f"{path} imports a part of kernels/ in another way than `from kernels... import ...`")
    names = [f"{statement.module}.{alias.name}" for statement in statements for alias in statement.names]
    modules = {name.removeprefix("kernels.").replace(".", "/") for name in names if name.startswith("kernels.")}
    candidates = {module for name in modules for module in (name, str(Path(name).parent))}
    return [file for module in sorted(candidates) if (file := (root / module).with_suffix(".py")).exists()]


def code(path: Path) -> str:
    """A source without its comments, docstrings and layout: a better sentence compiles nothing again."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def spec(kernel: Kernel) -> dict:
    """What a kernel says beyond the defaults: a new field changes the keys of those kernels only that set it."""
    return {field.name: value for field in fields(kernel) if (value := getattr(kernel, field.name)) != field.default}


def key(kernel: Kernel, target: str, versions: dict[str, str], root: Path = Path(__file__).parent) -> str:
    files = {str(path.relative_to(root)): code(path) for path in sources(kernel, root)}
    content = json.dumps([spec(kernel), target, versions, files], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class Cache:
    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("tmp.*"):
            with suppress(FileNotFoundError):  # another build was done with it
                if time.time() - path.stat().st_mtime > SECONDS_ABANDONED:
                    shutil.rmtree(path, ignore_errors=True)

    def _paths(self, key: str) -> tuple[Path, Path]:
        entry = self.directory / key[:2] / key
        return entry.with_suffix(".o"), entry.with_suffix(".json")

    def get(self, key: str) -> tuple[bytes, dict] | None:
        """The object and the facts about it, if they are here and whole."""
        object_path, facts_path = self._paths(key)
        try:
            content, facts = object_path.read_bytes(), json.loads(facts_path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return (content, facts["facts"]) if facts["sha256"] == hashlib.sha256(content).hexdigest() else None

    @contextmanager
    def workspace(self):
        """A folder on the cache's file system, to be renamed from."""
        directory = tempfile.mkdtemp(prefix="tmp.", dir=self.directory)
        try:
            yield Path(directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def put(self, key: str, compiled: Path, facts: dict) -> None:
        """Moves an object from a workspace into the cache."""
        object_path, facts_path = self._paths(key)
        object_path.parent.mkdir(exist_ok=True)
        digest = hashlib.sha256(compiled.read_bytes()).hexdigest()
        written = compiled.with_suffix(".json")
        written.write_text(json.dumps({"sha256": digest, "facts": facts}))
        os.rename(compiled, object_path)
        os.rename(written, facts_path)
