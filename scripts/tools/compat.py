"""Installs a wheel beside one torch after another, each in a clean environment, and runs
tests/installed there. Needs no GPU.

python -m scripts.tools.compat --wheel dist/*.whl --table docs/compatibility.md
python -m scripts.tools.compat --wheel dist/*.whl --torch oldest newest --python python3.12

Without --torch and --python it goes through requirements/compat.in, with the interpreters
python3.10, python3.11 ... on PATH; with them, through every pair of the two lists. `oldest` and
`newest` are the first and the last version of that file. An environment takes some 9 GB of disk
while pip fills it, and is deleted after its tests; --jobs runs several at a time. The exit status
is 1 if anything failed, and standard error names it.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kernels.progress import Progress

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "installed"
TESTED = ROOT / "requirements" / "compat.in"
BYTES_EACH = 9 << 30  # a CUDA torch, once as pip's downloads and once installed
SECONDS_EACH = 1800  # of one step
BEGIN, END = "<!-- python -m scripts.tools.compat writes from here", "<!-- to here -->"
WHAT_IS_INSTALLED = """
import json, platform, torch, fa4_ext
print(json.dumps({
    "torch": torch.__version__.partition("+")[0],
    "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version(),
    "python": platform.python_version(),
    "kernels": len(fa4_ext.kernels()),
    "commit": fa4_ext.build_info()["commit"][:12],
    "path": fa4_ext.__file__,
}))
"""


class StepFailed(Exception):
    pass


@dataclass
class Result:
    torch: str
    python: str
    installed: dict = field(default_factory=dict)
    passed: int = 0
    skipped: int = 0
    # Each failure has the name of a test or a step, and below it what it printed last.
    failures: list[str] = field(default_factory=list)
    install_seconds: float = 0
    test_seconds: float = 0


def last_lines(text: str) -> str:
    return textwrap.indent("\n".join(text.splitlines()[-20:]), "    ")


def run(*command: str | Path, cwd: Path, allowed: tuple[int, ...] = (0,)) -> str:
    """Runs a command and returns its output. The checkout is not on Python's path, so that the
    installed package is tested."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "FA4_EXT"))
    }
    try:
        done = subprocess.run(
            [str(part) for part in command], cwd=cwd, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=SECONDS_EACH,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise StepFailed(
            f"{Path(command[0]).name} ran for more than {SECONDS_EACH} seconds"
        ) from error
    if done.returncode not in allowed:
        raise StepFailed(
            f"{Path(command[0]).name} exited with {done.returncode}\n{last_lines(done.stdout)}"
        )
    return done.stdout


def requirement(name: str) -> str:
    """Returns the requirement with the version that requirements/test.txt pins."""
    (line,) = re.findall(
        rf"^{name}==\S+", (ROOT / "requirements" / "test.txt").read_text(), re.MULTILINE
    )
    return line


def install(folder: Path, torch: str, python: str, wheel: Path) -> dict:
    """Creates the environment folder/venv, installs torch and the wheel, and returns what is
    installed (WHAT_IS_INSTALLED)."""
    run(python, "-m", "venv", "venv", cwd=folder)
    pip = (
        folder / "venv/bin/python",
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-cache-dir",
        "install",
    )
    # The requirement has three equals signs, so that a 2.13.0+cpu that a machine may have lying
    # about does not stand in for 2.13.0.
    run(*pip, f"torch==={torch}", requirement("pytest"), wheel, cwd=folder)
    found = json.loads(
        run(
            folder / "venv/bin/python", "-W", "ignore", "-c", WHAT_IS_INSTALLED, cwd=folder
        ).splitlines()[-1]
    )
    if (
        not found["cuda"]
        or not Path(found["path"]).is_relative_to(folder)
        or found["torch"] != torch
    ):
        raise StepFailed(
            f"expected a CUDA build of torch {torch} and fa4_ext from {wheel.name}, got {found}"
        )
    return found


def run_tests(folder: Path, result: Result) -> None:
    shutil.copytree(TESTS, folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    report = folder / "report.xml"
    output = run(
        folder / "venv/bin/pytest",
        "-q",
        f"--junitxml={report}",
        "tests",
        cwd=folder,
        allowed=(0, 1, 2),
    )
    if not report.exists():
        raise StepFailed(f"pytest wrote no report\n{last_lines(output)}")
    count(report.read_text(), result)


def count(report: str, result: Result) -> None:
    """Adds up a JUnit report."""
    for case in ElementTree.fromstring(report).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        if problem is not None:
            result.failures.append(
                f"{case.get('classname')}::{case.get('name')}\n{last_lines(problem.text or '')}"
            )
        elif case.find("skipped") is not None:
            result.skipped += 1
        else:
            result.passed += 1
    if not result.passed and not result.failures:
        result.failures.append("no test ran")


def check(torch: str, python: str, wheel: Path, progress: Progress) -> Result:
    result = Result(torch, Path(python).name)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fa4_ext-compat-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        try:
            progress.started(f"torch {torch} into {Path(python).name}")
            result.installed = install(folder, torch, python, wheel)
            result.install_seconds = time.monotonic() - begin
            progress.started(f"tests with torch {torch} in Python {result.installed['python']}")
            run_tests(folder, result)
            result.test_seconds = time.monotonic() - begin - result.install_seconds
        except StepFailed as error:
            result.failures.append(str(error))
    progress.finished()
    for failure in result.failures:
        print(f"torch {torch}, {result.python}: {failure}", file=sys.stderr, flush=True)
    return result


COLUMNS = ("torch", "CUDA", "cuDNN", "Python", "passed", "failed", "skipped", "install", "tests")


def row(result: Result) -> tuple[str, ...]:
    found = result.installed
    seconds = (f"{result.install_seconds:.0f} s", f"{result.test_seconds:.0f} s")
    counts = map(str, (result.passed, len(result.failures), result.skipped))
    return (
        result.torch,
        found.get("cuda", "?"),
        cudnn(found.get("cudnn")),
        found.get("python", result.python),
        *counts,
        *seconds,
    )


def cudnn(version: int | None) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else "?"


def table(results: list[Result], wheel: Path) -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(row, results)]
    found = next((result.installed for result in results if result.installed), {})
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    build = (
        f"{wheel.name}, {found.get('kernels', '?')} kernels, commit {found.get('commit', '?')}, "
        f"{datetime.date.today()}."
    )
    return "\n".join([*lines, "", build])


def replace(text: str, new: str) -> str:
    """Returns the text with everything between its two marked lines replaced."""
    before, begin, rest = text.partition(BEGIN)
    first_line, _, rest = rest.partition("\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(
            f"the file of --table needs a line that begins with '{BEGIN}' and a later one with "
            f"'{END}'"
        )
    return f"{before}{begin}{first_line}\n{new}\n{end}{after}"


def tested() -> dict[str, list[str]]:
    """Returns the versions of torch in requirements/compat.in, oldest first, and those of CPython
    for each."""
    lines = re.findall(r"^torch==(\S+) # (.+)$", TESTED.read_text(), re.MULTILINE)
    return {torch: versions.split() for torch, versions in lines}


def combinations(torches: list[str] | None, pythons: list[str] | None) -> list[tuple[str, str]]:
    """Returns the pairs of torch version and Python interpreter to test."""
    listed = tested()
    named = {"oldest": next(iter(listed)), "newest": next(reversed(listed))}
    if torches or pythons:
        pairs = [
            (named.get(torch, torch), python)
            for torch in torches or listed
            for python in pythons or [sys.executable]
        ]
    else:
        pairs = [
            (torch, f"python{version}")
            for torch, versions in listed.items()
            for version in versions
        ]
    # The path is not resolved further, because a virtual environment's interpreter is a link to one
    # that lacks its packages.
    found = {python: shutil.which(python) for _, python in pairs}
    missing = [
        python
        for python, path in found.items()
        if not path or subprocess.run([path, "-c", ""], capture_output=True).returncode
    ]
    if missing:
        raise SystemExit(f"no interpreter {', '.join(missing)}; name those to use with --python")
    return [(torch, os.path.abspath(found[python])) for torch, python in pairs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--torch", nargs="+", metavar="VERSION")
    parser.add_argument("--python", nargs="+", metavar="COMMAND")
    parser.add_argument("--jobs", type=int, default=1, help="environments at a time")
    parser.add_argument(
        "--table", type=Path, help="file to write the results into, between its marks"
    )
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve()
    if not wheel.is_file():
        parser.error(f"there is no {arguments.wheel}; `make wheel` builds one")
    if arguments.table:
        # This fails before anything takes long.
        replace(arguments.table.read_text(), "")
    pairs = combinations(arguments.torch, arguments.python)
    needed, free = arguments.jobs * BYTES_EACH, shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise SystemExit(
            f"{tempfile.gettempdir()} has {free >> 30} GB free, {needed >> 30} are needed: set "
            "TMPDIR, or lower --jobs"
        )

    progress = Progress(len(pairs), what="environments")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda pair: check(*pair, wheel, progress), pairs))
    text = table(results, wheel)
    print(text)
    if arguments.table:
        arguments.table.write_text(replace(arguments.table.read_text(), text))
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
