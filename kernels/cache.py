"""The cache of compiled objects: by content, outside the clone.

An entry is an object and, written after it, a JSON file of facts with a hash of both. The two
appear by a rename within one file system, so a build that is killed, or two at once, leave whole
entries or none. What can't be read as an entry, is damaged, or may have been written by another
user counts as none: it is compiled again, and replaced.
"""

import ast
import functools
import hashlib
import json
import os
import pwd
import shutil
import stat
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kernels.errors import BuildError
from kernels.kernel import Kernel

PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")
SECONDS_ABANDONED = 24 * 3600  # a temporary folder this old belongs to a build that was killed
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
FOLDER_MODE = 0o777 & ~WRITABLE_BY_OTHERS  # less what the umask takes


def default_directory() -> Path:
    """The folder that the environment names.

    Raises:
        BuildError: it names none.
    """
    if chosen := os.environ.get("FA4_EXT_CACHE"):
        return Path(chosen)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # neither HOME nor an entry in the list of users
        raise BuildError(
            "there is no folder for compiled kernels, because this user has no home folder: name "
            "one with FA4_EXT_CACHE"
        ) from error
    return Path(base, "fa4_ext", "kernels")


def source_versions() -> dict[str, str]:
    """Installed versions of what compiles.

    Raises:
        BuildError: a package is missing, or lies there without its metadata.
    """
    return {package: _installed_version(package) for package in PACKAGES}


def _installed_version(package: str) -> str:
    try:
        found = version(package)
    except PackageNotFoundError:
        found = None
    if not found:
        raise BuildError(
            f"{package} is not installed in {sys.prefix}, or without its metadata (a .dist-info "
            "folder), which says its version; "
            "the build needs: pip install --no-deps -r requirements/build.txt"
        )
    return found


def sources(kernel: Kernel, root: Path) -> list[Path]:
    """The files that decide what is compiled: the entry and what it imports. kernel.py is left out,
    because the key contains the spec, and an entry reads nothing else of the tables."""
    # the readers of the facts
    found = {root / name for name in ("worker.py", "header.py", "cubin.py")}
    left = [root / f"{kernel.module}.py"]
    while left:
        found.add(path := left.pop())
        left += set(imports(path, root)) - found - {root / "kernel.py"}
    return sorted(found)


def imports(path: Path, root: Path) -> list[Path]:
    """The files below kernels/ that a file imports, all of them by `from kernels...`."""
    candidates = _imported(path.read_text())
    if candidates is None:
        raise ValueError(
            f"{path} imports a part of kernels/ in another way than `from kernels... import ...`"
        )
    return [file for module in candidates if (file := (root / module).with_suffix(".py")).exists()]


@functools.cache  # a thousand kernels have some twenty sources
def _imported(source: str) -> list[str] | None:
    """The modules below kernels/ that a source may import, as paths without a suffix; None where it
    does so in another way."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    statements = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    if any(name.split(".")[0] == "kernels" for name in plain) or any(
        statement.level for statement in statements
    ):
        return None
    names = [
        f"{statement.module}.{alias.name}" for statement in statements for alias in statement.names
    ]
    modules = {
        name.removeprefix("kernels.").replace(".", "/")
        for name in names
        if name.startswith("kernels.")
    }
    return sorted({module for name in modules for module in (name, str(Path(name).parent))})


def code(path: Path) -> str:
    """A source without its comments, docstrings and layout, so that a better sentence compiles
    nothing again."""
    return _code(path.read_text())


@functools.cache
def _code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return ast.dump(tree)


def spec(kernel: Kernel) -> dict:
    """The fields of a kernel that differ from their defaults, so that a new field changes the keys
    only of kernels that set it."""
    return {
        field.name: value
        for field in fields(kernel)
        if (value := getattr(kernel, field.name)) != field.default
    }


def key(
    kernel: Kernel, target: str, versions: dict[str, str], root: Path = Path(__file__).parent
) -> str:
    files = {str(path.relative_to(root)): code(path) for path in sources(kernel, root)}
    # Another minor version of Python changes a description of the arguments that the compiler
    # leaves in the object.
    python = [sys.implementation.name, *sys.version_info[:2]]
    return _sha256(
        json.dumps([spec(kernel), target, versions, python, files], sort_keys=True).encode()
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(key: str, content: bytes, facts: dict) -> str:
    """The digest in an entry's facts file. It detects a damaged object, damaged facts, and an entry
    stored under another key."""
    return _sha256(json.dumps([key, _sha256(content), facts], sort_keys=True).encode())


def who_else_writes(status: os.stat_result, user: int) -> str | None:
    """Says in words who but the user and root could have put something into a file or folder. None
    means nobody."""
    if status.st_uid not in (user, 0):
        return (
            f"it belongs to {_user_name(status.st_uid)}, and this build runs as {_user_name(user)}"
        )
    if status.st_mode & WRITABLE_BY_OTHERS:
        return (
            f"its mode is {stat.S_IMODE(status.st_mode):o}, which lets more than its owner write "
            "to it"
        )
    return None


def _user_name(user: int) -> str:
    with suppress(KeyError):
        return f"{pwd.getpwuid(user).pw_name} ({user})"
    return f"user {user}"


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that nobody writes to would be waited for


def _read(path: Path) -> bytes:
    """Reads a file that nobody else could have written. Raises OSError where there is none."""
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or who_else_writes(status, os.geteuid()):
            raise PermissionError(path)
        return file.read()


# Another build may act between any two lines of these, so that a look at what lies in the way says
# nothing about the next line: they act, and clear the way where that fails.
def _make_folder(path: Path) -> None:
    """Makes a folder, in place of a file that lies there."""
    try:
        path.mkdir(FOLDER_MODE, exist_ok=True)
    except FileExistsError:
        with suppress(FileNotFoundError, IsADirectoryError):
            path.unlink()
        path.mkdir(FOLDER_MODE, exist_ok=True)


def _move(file: Path, place: Path) -> None:
    """Moves a file to its place, where a file or a folder may lie."""
    try:
        os.rename(file, place)
    except IsADirectoryError:
        shutil.rmtree(place, ignore_errors=True)
        os.rename(file, place)


class Cache:
    """The entries below a folder, which is made where it is missing.

    Raises:
        BuildError: the folder can't be made, or others than this user and root can write to it.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            directory.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            status = directory.stat()
        except OSError as error:
            raise BuildError(
                f"{directory} can't be the folder of compiled kernels: {error.strerror}; name "
                "another with FA4_EXT_CACHE"
            ) from error
        if others := who_else_writes(status, os.geteuid()):
            raise BuildError(
                f"{directory} can't be the folder of compiled kernels: {others}, and what others "
                "leave there would go into the "
                "library. Name a folder of your own with FA4_EXT_CACHE, delete this one, or, if "
                "you trust all that is in it, run: "
                f"chown -R {os.geteuid()} {directory} && chmod -R go-w {directory}"
            )
        for path in directory.glob("tmp.*"):
            with suppress(OSError):  # another build was done with it
                if time.time() - path.stat().st_mtime > SECONDS_ABANDONED:
                    shutil.rmtree(path, ignore_errors=True)

    def _paths(self, key: str) -> tuple[Path, Path]:
        entry = self.directory / key[:2] / key
        return entry.with_suffix(".o"), entry.with_suffix(".json")

    def get(self, key: str) -> tuple[bytes, dict] | None:
        """The object and the facts about it, if they are here and whole."""
        object_path, facts_path = self._paths(key)
        try:
            content, entry = _read(object_path), json.loads(_read(facts_path))
            facts = entry["facts"]
            return (content, facts) if entry["sha256"] == _digest(key, content, facts) else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):  # whatever the damage
            return None

    @contextmanager
    def workspace(self):
        """A folder on the cache's file system, to be renamed from."""
        try:
            directory = tempfile.mkdtemp(prefix="tmp.", dir=self.directory)
        except OSError as error:
            raise BuildError(
                f"{self.directory} lacks a kernel and can't be written to: {error.strerror}; name "
                "another with FA4_EXT_CACHE"
            ) from error
        try:
            yield Path(directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def put(self, key: str, compiled: Path, facts: dict) -> tuple[bytes, dict]:
        """Moves an object from a workspace into the cache, in place of what is there, and returns
        what get() will."""
        object_path, facts_path = self._paths(key)
        content = compiled.read_bytes()
        written = compiled.with_suffix(".json")
        written.write_text(json.dumps({"sha256": _digest(key, content, facts), "facts": facts}))
        _make_folder(object_path.parent)
        for new, place in ((compiled, object_path), (written, facts_path)):
            new.chmod(new.stat().st_mode & ~WRITABLE_BY_OTHERS)
            _move(new, place)
        return content, facts
