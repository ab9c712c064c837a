"""Uses the package on a cluster: many processes at once, a file system that is only read, an older
version beside it, torchrun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from packages import command, copy_package, preamble
from processes import python, run

import fa4_ext

REGISTERED = (
    "assert 'registered at fa4_ext:' in torch._C._dispatch_dump('aten::_flash_attention_forward')\n"
)
EXPLAIN = """
query = torch.empty(2, 16, 4096, 128, dtype=torch.bfloat16, device="meta")
capability = {90: (9, 0), 100: (10, 0)}[fa4_ext.build_info()["archs"][0]]
assert fa4_ext.explain(query, query, query, device_capability=capability).supported
"""


def imported_from(folder: Path) -> str:
    return (
        f"import torch, fa4_ext\nassert fa4_ext.__file__.startswith({str(folder)!r}), "
        "fa4_ext.__file__\n" + REGISTERED + EXPLAIN
    )


def test_eight_processes_import_at_once(tmp_path):
    """They import from one folder without byte code, which all of them write."""
    copy_package(tmp_path)
    # Torch first: each says when it is there, and then waits for the line that lets all of them go
    # on.
    code = (
        preamble(tmp_path)
        + "import torch; print('ready', flush=True); input()\n"
        + imported_from(tmp_path)
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    environment.pop("FA4_EXT_AUTOREGISTER", None)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [
        subprocess.Popen([sys.executable, "-c", code], **pipes, text=True, env=environment)
        for _ in range(8)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 8, outputs


NOTHING_WRITTEN = """
import os, sys
import torch

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink")

def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        sys.exit(f"opened for writing: {arguments}")
    if event in (*CHANGES, "tempfile.mkstemp", "tempfile.mkdtemp"):
        sys.exit(f"{event}: {arguments}")

sys.addaudithook(watch)
"""


def test_importing_registering_and_planning_write_no_file():
    run(
        NOTHING_WRITTEN + "import fa4_ext\nfa4_ext.register().remove()\n" + REGISTERED + EXPLAIN,
        "-B",
    )


def read_only(folder: Path) -> list[str]:
    """Returns what to put before a command that shall find the folder read-only, whoever runs
    it."""
    if os.getuid() != 0:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        return []
    mount = (
        f'mount --bind "{folder}" "{folder}" && mount -o remount,bind,ro "{folder}" && cd '
        f'"{folder}" && exec "$@"'
    )
    prefix = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("root may write everywhere, and may mount nothing here")
    return prefix


NOT_WRITABLE = """
try:
    open("file", "w")
except OSError:
    pass
else:
    raise SystemExit("the test's folder is writable")
"""


def test_read_only_file_system(tmp_path):
    """There is no byte code, no cache, no home, no current folder and no temporary folder that can
    be written to."""
    copy_package(tmp_path)
    try:
        prefix = read_only(tmp_path)
        code = NOT_WRITABLE + preamble(tmp_path) + imported_from(tmp_path)
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "-1",
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
        }
        environment.pop("FA4_EXT_AUTOREGISTER", None)
        arguments = [*prefix, sys.executable, "-c", code]
        done = subprocess.run(
            arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    finally:
        for path in (tmp_path, *tmp_path.rglob("*")):
            path.chmod(0o755)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.pyc"))


def distribution(folder: Path, version: str) -> None:
    """Makes what pip leaves of a version, besides the package."""
    info = folder / f"fa4_ext-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: fa4_ext\nVersion: {version}\n")


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Returns a folder with this package as pip installs it, and one with an older version that
    must not be run."""
    new, old = tmp_path / "new", tmp_path / "old"
    copy_package(new)
    (new / "version.txt").unlink()
    distribution(new, fa4_ext.__version__)
    (old / "fa4_ext").mkdir(parents=True)
    (old / "fa4_ext" / "__init__.py").write_text("raise SystemExit('the older one was imported')")
    distribution(old, "0.0.1")
    return new, old


def test_an_older_version_later_in_the_path_is_not_used_and_noted(folders):
    run(
        preamble(*folders)
        + imported_from(folders[0])
        + f"assert fa4_ext.__version__ == {fa4_ext.__version__!r}"
    )
    result = command("doctor", "--no-gpu", folders=folders)
    assert result.returncode == 0, result.stdout
    assert (
        f"note   distribution  0.0.1 is installed too, in {folders[1] / 'fa4_ext'}" in result.stdout
    )


def test_an_older_version_that_hides_a_newer_one_is_wrong(folders):
    new, old = folders
    # Seen from the newer version, which `command` runs, this is the same as an older one that comes
    # first.
    distribution(old, "99.0")
    shutil.rmtree(old / "fa4_ext-0.0.1.dist-info")
    result = command("doctor", "--no-gpu", folders=(new, old))
    assert result.returncode == 1
    assert f"{fa4_ext.__version__} hides a newer one, 99.0 in {old / 'fa4_ext'}" in result.stdout


def test_an_older_version_left_in_the_same_folder_is_wrong(folders):
    distribution(folders[0], "0.0.1")
    result = command("doctor", "--no-gpu", folders=folders[:1])
    assert result.returncode == 1 and "belongs to several installed versions" in result.stdout


RANK = """
import torch
import torch.distributed as dist
import fa4_ext

dist.init_process_group("gloo")
with fa4_ext.register() as handle:
    ours = "registered at fa4_ext:" in torch._C._dispatch_dump("aten::_flash_attention_forward")
    facts = [dist.get_rank(), handle.active, ours, fa4_ext.default_handle.active]
    mine = torch.tensor(facts, dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)  # not all_gather_object, which needs NumPy
dist.destroy_process_group()
assert [rank.tolist() for rank in everyone] == [[0, 1, 1, 1], [1, 1, 1, 1]], everyone
"""


def test_torchrun_registers_in_every_rank(tmp_path):
    if not torch_distributed():
        pytest.skip("this torch has no gloo")
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    path = os.pathsep.join(
        [str(Path(fa4_ext.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    result = python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        PYTHONPATH=path,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def torch_distributed() -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_gloo_available()
