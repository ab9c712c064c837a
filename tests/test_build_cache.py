"""The cache of compiled kernels: what its keys depend on, kills, concurrent builds, and kernels that fail."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernels import pool
from kernels.cache import Cache, default_directory, key, source_versions
from kernels.matrix import Kernel, Mask, Op, matrix
from kernels.progress import Progress

ROOT = Path(__file__).parents[1]
KERNELS = matrix()
FORWARD = next(kernel for kernel in KERNELS if kernel.op is Op.FORWARD and kernel.arch == 90)
assert FORWARD.persistent
VERSIONS = {"flash-attn-4": "1"}


def test_defaults_are_those_that_cached_objects_were_compiled_with():
    """A key leaves out what is at its default, so that a default never changes: another value takes a name of its own."""
    defaults = {field.name: field.default for field in dataclasses.fields(Kernel) if field.default is not dataclasses.MISSING}
    assert defaults == {
        "block_n": 0, "mask": Mask.FULL, "grouped": False, "deterministic": False, "two_cta": False, "cluster": 1, "threads": 0,
        "atom_layout_m": 1, "swap_ab": False, "atom_layout_dkv": 2, "swap_ab_dkv": False,
        "dq_warpgroups": 2, "stages": 0, "blocks_per_sm": 0, "q_stages": 0, "turns": True, "tuned": False,
    }  # fmt: skip


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def put(cache, name, content):
    with cache.workspace() as directory:
        compiled = directory / "kernel.o"
        compiled.write_bytes(content)
        cache.put(name, compiled, {"registers": 1})


def test_what_is_put_is_got(cache):
    put(cache, "k" * 64, b"object")
    assert cache.get("k" * 64) == (b"object", {"registers": 1})
    assert cache.get("l" * 64) is None
    assert not list(cache.directory.glob("tmp.*"))


@pytest.mark.parametrize("damage", [b"", b"obje", b"objekt"])
def test_a_damaged_object_is_not_used(cache, damage):
    put(cache, "k" * 64, b"object")
    next(cache.directory.glob("*/*.o")).write_bytes(damage)
    assert cache.get("k" * 64) is None


def test_an_object_without_its_facts_is_not_used(cache):
    put(cache, "k" * 64, b"object")
    next(cache.directory.glob("*/*.json")).unlink()
    assert cache.get("k" * 64) is None


def test_abandoned_folders_are_removed(tmp_path):
    old, new = tmp_path / "tmp.old", tmp_path / "tmp.new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    Cache(tmp_path)
    assert not old.exists() and new.exists()


def test_directory_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("FA4_EXT_CACHE", "/somewhere")
    assert default_directory() == Path("/somewhere")
    monkeypatch.delenv("FA4_EXT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_directory() == Path("/cache/fa4_ext/kernels")


@pytest.fixture
def sources(tmp_path):
    root = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", root, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def test_keys_differ_between_kernels():
    assert len({key(kernel, "sm", VERSIONS) for kernel in KERNELS}) == len(KERNELS)


def test_key_depends_on_spec_target_and_versions():
    base = key(FORWARD, "sm_90a", VERSIONS)
    assert base == key(FORWARD, "sm_90a", VERSIONS)
    assert base != key(dataclasses.replace(FORWARD, mask=Mask.WINDOW), "sm_90a", VERSIONS)
    assert base != key(FORWARD, "sm_90", VERSIONS)
    assert base != key(FORWARD, "sm_90a", {"flash-attn-4": "2"})


@pytest.mark.parametrize(
    ("edited", "matters"),
    [("sm90/forward.py", True), ("sm90/tiles.py", True), ("common/arguments.py", True), ("worker.py", True),
     ("sm90/decode.py", False), ("sm100/forward.py", False), ("matrix.py", False), ("build.py", False), ("table.py", False),
     ("pool.py", False)],
)  # fmt: skip
def test_key_depends_on_the_sources_that_compile(sources, edited, matters):
    before = key(FORWARD, "sm_90a", VERSIONS, sources)
    with (sources / edited).open("a") as file:
        file.write("edited = True\n")
    assert (key(FORWARD, "sm_90a", VERSIONS, sources) != before) is matters


def test_comments_docstrings_and_layout_compile_nothing_again(sources):
    before = key(FORWARD, "sm_90a", VERSIONS, sources)
    path = sources / "sm90" / "forward.py"
    path.write_text('"""Another sentence."""\n\n\n# a comment\n' + path.read_text().split('"""', 2)[2])
    assert key(FORWARD, "sm_90a", VERSIONS, sources) == before


def test_versions_are_of_what_compiles():
    assert set(source_versions()) == {"flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels"}


FAKE_WORKER = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    behaviour = {behaviour!r}
    if behaviour == "dies":
        print("out of registers", file=sys.stderr, flush=True)
        os.abort()
    if behaviour == "exits":
        sys.exit(3)
    path = os.path.join(request["directory"], "kernel.o")
    if behaviour == "slow":
        open(path, "w").write("half")
        time.sleep(60)
    open(path, "w").write(os.environ["CUTE_DSL_ARCH"] + str(request["kernel"]["head_dim"]))
    print(json.dumps({{"registers": 1}}), flush=True)
"""


def fake(behaviour):
    return (sys.executable, "-c", FAKE_WORKER.format(behaviour=behaviour))


def compile_with(command, cache, kernels=KERNELS[:8], jobs=2):
    keys = {kernel: kernel.name for kernel in kernels}
    finished = []
    pool.compile_all(kernels, keys, cache, jobs, lambda kernel: None, finished.append, command)
    return finished


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_every_kernel_is_compiled_once_for_its_target(cache, jobs):
    assert sorted(kernel.name for kernel in compile_with(fake("works"), cache, jobs=jobs)) == sorted(k.name for k in KERNELS[:8])
    for kernel in KERNELS[:8]:
        assert cache.get(kernel.name)[0].decode() == pool.TARGETS[kernel.arch] + str(kernel.head_dim)


@pytest.mark.parametrize(("behaviour", "message"), [("dies", r"out of registers\n.*SIGABRT"), ("exits", "exited with status 3")])
def test_a_worker_that_dies_fails_the_build_with_the_kernel_and_its_message(cache, behaviour, message):
    with pytest.raises(pool.CompileError, match=rf"kernel sm\w+ failed to compile:\n(.|\n)*{message}"):
        compile_with(fake(behaviour), cache)


def test_a_kernel_that_fails_fails_the_build_with_its_name_and_the_compiler_s_message(cache):
    broken = dataclasses.replace(FORWARD, block_m=100)  # not a multiple of a warpgroup's 64 rows
    with pytest.raises(pool.CompileError) as error:
        compile_with(pool.WORKER, cache, [broken], jobs=1)
    assert f"kernel {broken.name} failed to compile" in str(error.value)
    assert "Error" in str(error.value) and "must be one to three times 64, is 100" in str(error.value)


BUILD = """
import sys
from pathlib import Path
from kernels.cache import Cache
from test_build_cache import compile_with, fake
compile_with(fake(sys.argv[2]), Cache(Path(sys.argv[1])))
"""


def start_build(directory, behaviour):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen([sys.executable, "-c", BUILD, str(directory), behaviour], env={**os.environ, "PYTHONPATH": path})


def test_a_killed_build_leaves_nothing_half_written(cache):
    build = start_build(cache.directory, "slow")
    deadline = time.monotonic() + 60
    while not list(cache.directory.glob("tmp.*/kernel.o")):
        assert time.monotonic() < deadline and build.poll() is None
        time.sleep(0.05)
    build.send_signal(signal.SIGKILL)
    build.wait()
    assert all(cache.get(kernel.name) is None for kernel in KERNELS[:8])
    assert len(compile_with(fake("works"), cache)) == 8


def test_concurrent_builds_share_a_cache(cache):
    builds = [start_build(cache.directory, "works") for _ in range(3)]
    assert [build.wait(timeout=120) for build in builds] == [0, 0, 0]
    assert all(cache.get(kernel.name) for kernel in KERNELS[:8])
    assert not list(cache.directory.glob("tmp.*"))
    assert {json.loads(path.read_text())["facts"]["registers"] for path in cache.directory.glob("*/*.json")} == {1}


class Output(list):
    def __init__(self, terminal):
        self.isatty = lambda: terminal

    write = list.append

    def flush(self):
        pass


def test_progress_on_a_terminal_rewrites_one_line():
    now = [0.0]
    output = Output(terminal=True)
    progress = Progress(2, output, clock=lambda: now[0])
    progress.started(KERNELS[0].name)
    now[0] = 65
    progress.finished()
    text = "".join(output)
    assert f"1/2 kernels, 1:05 elapsed, 1:05 left: {KERNELS[0].name}" in text
    assert "\n" not in text and text.count("\r") == 2


def test_progress_elsewhere_is_a_line_now_and_then():
    now = [0.0]
    output = Output(terminal=False)
    progress = Progress(100, output, clock=lambda: now[0])
    for kernel in KERNELS[:100]:
        now[0] += 1
        progress.started(kernel.name)
        progress.finished()
    lines = "".join(output).splitlines()
    assert 10 <= len(lines) <= 11 and lines[-1].startswith("100/100 kernels")
