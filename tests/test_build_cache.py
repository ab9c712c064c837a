"""Checks the cache of compiled kernels: what its keys depend on, kills, concurrent builds, and
kernels that fail."""

import dataclasses
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from kernels import build, pool, signature
from kernels.cache import Cache, default_directory, key, source_versions, who_else_writes
from kernels.cache import sources as read_sources
from kernels.errors import BuildError
from kernels.kernel import Kernel, Mask, Op
from kernels.matrix import matrix, with_candidates

ROOT = Path(__file__).parents[1]
KERNELS = matrix()
FORWARD = next(kernel for kernel in KERNELS if kernel.op is Op.FORWARD and kernel.arch == 90)
assert FORWARD.persistent
VERSIONS = {"flash-attn-4": "1"}


def test_defaults_are_those_that_cached_objects_were_compiled_with():
    """A key leaves out what is at its default, so a default never changes: another value takes a
    name of its own."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(Kernel)
        if field.default is not dataclasses.MISSING
    }
    assert defaults == {
        "block_n": 0, "mask": Mask.FULL, "grouped": False, "deterministic": False, "two_cta": False,
        "cluster": 1, "threads": 0,
        "atom_layout_m": 1, "swap_ab": False, "atom_layout_dkv": 2, "swap_ab_dkv": False,
        "swap_ab_sdp": False, "dq_warpgroups": 2, "stages": 0, "v_stages": 0, "ctas_per_sm": 0,
        "q_stages": 0, "do_stages": 0, "pds_stages": 0, "pingpong": True, "consumer_registers": 0,
        "producer_registers": 0, "tuned": False,
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


def a_folder(path):
    path.unlink()
    path.mkdir()
    (path / "file").write_text("in it")


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


# A loop is as good as a file that may not be read, which root may.
def a_loop(path):
    path.unlink()
    path.symlink_to(path)


def a_flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def group_writes(path):
    path.chmod(0o664)


def others_write(path):
    path.chmod(0o646)


def written(content):
    return lambda path: path.write_bytes(content)


def facts_changed(**change):
    """Returns facts that are well formed, and not those that were put."""

    def damage(path):
        entry = json.loads(path.read_text())
        path.write_text(json.dumps(entry | {"facts": entry["facts"] | change}))

    return damage


DAMAGES = {
    "folder": a_folder, "pipe": a_pipe, "unreadable": a_loop, "missing": Path.unlink,
    "flipped_bit": a_flipped_bit,
    "group_writes": group_writes, "others_write": others_write, "empty": written(b""),
    "cut_off": written(b'{"sha256'),
    "not_utf8": written(b"\xff\xfe\xfd"), "no_object": written(b"{}"), "null": written(b"null"),
    "list": written(b"[1, 2]"),
    "number": written(b"7"), "string": written(b'"sha256"'), "too_deep": written(b"[" * 100_000),
    "long_number": written(b"9" * 5_000), "nulls": written(b'{"sha256": null, "facts": null}'),
    "no_facts": written(b'{"sha256": ""}'),
}  # fmt: skip


@pytest.mark.parametrize("suffix", (".o", ".json"))
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_no_whole_entry_counts_as_none_and_is_replaced(cache, suffix, damage):
    put(cache, "k" * 64, b"object")
    (path,) = cache.directory.glob(f"*/*{suffix}")
    damage(path)
    assert cache.get("k" * 64) is None
    put(cache, "k" * 64, b"again")
    assert cache.get("k" * 64) == (b"again", {"registers": 1})


@pytest.mark.parametrize("change", [{"registers": 2}, {"launch": "another"}], ids=str)
def test_facts_that_are_not_those_of_the_object_are_not_used(cache, change):
    put(cache, "k" * 64, b"object")
    (path,) = cache.directory.glob("*/*.json")
    facts_changed(**change)(path)
    assert cache.get("k" * 64) is None


def test_an_entry_under_another_key_is_not_used(cache):
    for name in ("k", "m"):
        put(cache, name * 64, name.encode())
    for suffix in (".o", ".json"):
        shutil.copy(
            cache.directory / "mm" / ("m" * 64 + suffix),
            cache.directory / "kk" / ("k" * 64 + suffix),
        )
    assert cache.get("m" * 64) == (b"m", {"registers": 1})
    assert cache.get("k" * 64) is None


def test_a_file_where_a_folder_of_entries_shall_be_is_replaced(cache):
    (cache.directory / "kk").write_text("a file")
    assert cache.get("k" * 64) is None
    put(cache, "k" * 64, b"object")
    assert cache.get("k" * 64) == (b"object", {"registers": 1})


def run_before_line(count, act, function):
    """Runs function(), and act() before the line of kernels/cache.py that is number `count` in it.
    Returns whether there was such a line."""
    left = count

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.endswith("kernels/cache.py"):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return left <= 0


def file_for_folder(directory):
    (directory / "kk").write_text("a file")


def folders_for_files(directory):
    for suffix in (".o", ".json"):
        (directory / "kk" / ("k" * 64 + suffix) / "below").mkdir(parents=True)


@pytest.mark.parametrize("in_the_way", (None, file_for_folder, folders_for_files))
@pytest.mark.parametrize("other", ("k" * 64, "kk" + "l" * 62), ids=("same", "same_folder"))
def test_a_build_may_put_between_any_two_lines_of_another_s(tmp_path, in_the_way, other):
    for line in range(1, 200):
        cache = Cache(tmp_path / str(line))
        if in_the_way:
            in_the_way(cache.directory)
        this, another = (partial(put, cache, name, b"object") for name in ("k" * 64, other))
        reached = run_before_line(line, another, this)
        if not reached:
            break
        # Another's entry that came between this one's two files is whole, as they are the same.
        for name in {other, "k" * 64}:
            assert cache.get(name) == (b"object", {"registers": 1}), (line, name)
    assert 20 < line < 199, line


@pytest.fixture
def umask():
    """Sets the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", (0o000, 0o002, 0o022, 0o077), ids=oct)
def test_what_is_made_can_be_written_by_its_owner_alone_whatever_the_umask(tmp_path, umask, mask):
    umask(mask)
    directory = tmp_path / "cache"
    put(Cache(directory), "k" * 64, b"object")
    made = [directory, *directory.glob("**/*")]
    assert len(made) == 4
    assert {stat.S_IMODE(path.stat().st_mode) & (0o022 | mask) for path in made} == {0}
    assert Cache(directory).get("k" * 64) == (b"object", {"registers": 1})


ME, ROOT_USER, ANOTHER = 1000, 0, 1001


@pytest.mark.parametrize(
    ("owner", "mode", "user", "words"),
    [
        (ME, 0o755, ME, None), (ME, 0o700, ME, None), (ROOT_USER, 0o755, ME, None),
        (ROOT_USER, 0o755, ROOT_USER, None),
        (ANOTHER, 0o755, ME, "it belongs to user 1001, and this build runs as user 1000"),
        (ANOTHER, 0o755, ROOT_USER, "it belongs to user 1001, and this build runs as root (0)"),
        (ME, 0o775, ME, "its mode is 775, which lets more than its owner write to it"),
        (ME, 0o757, ME, "its mode is 757"), (ROOT_USER, 0o1777, ME, "its mode is 1777"),
        (ROOT_USER, 0o2775, ME, "its mode is 2775"),
    ],
)  # fmt: skip
def test_who_may_write_to_a_cache(monkeypatch, owner, mode, user, words):
    root = pwd.getpwuid(0)
    # All others raise KeyError.
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {0: root}[number])
    said = who_else_writes(
        os.stat_result((stat.S_IFDIR | mode, 0, 0, 0, owner, 0, 0, 0, 0, 0)), user
    )
    assert said is None if words is None else words in said


def give_away(path, monkeypatch):
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        # What belongs to this user is another's to that one.
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


def test_a_folder_of_another_user_is_refused_with_what_to_do(tmp_path, monkeypatch):
    give_away(tmp_path, monkeypatch)
    with pytest.raises(
        BuildError, match=r"it belongs to .* FA4_EXT_CACHE, .*chown -R \d+ .* && chmod -R go-w "
    ):
        Cache(tmp_path)


def test_a_folder_that_its_group_writes_to_is_refused_with_what_to_do(tmp_path):
    tmp_path.chmod(0o775)
    with pytest.raises(
        BuildError,
        match=r"its mode is 775, which lets more than its owner .*FA4_EXT_CACHE.*chmod -R go-w ",
    ):
        Cache(tmp_path)


def test_another_user_s_entry_is_not_used(cache, monkeypatch):
    put(cache, "k" * 64, b"object")
    give_away(next(cache.directory.glob("*/*.o")), monkeypatch)
    assert cache.get("k" * 64) is None


def test_a_folder_that_lacks_a_kernel_and_cannot_be_written_to_is_named(cache, monkeypatch):
    def no_folder(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", no_folder)
    with pytest.raises(
        BuildError,
        match=r"lacks a kernel and can't be written to: Permission denied; name another with "
        r"FA4_EXT_CACHE",
    ):
        put(cache, "k" * 64, b"object")


def test_a_file_in_the_folder_s_place_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="File exists; name another with FA4_EXT_CACHE"):
        Cache(tmp_path / "file")


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


def test_without_a_home_folder_a_directory_must_be_named(monkeypatch):
    for name in ("FA4_EXT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    # It raises KeyError, as for a user that no list names.
    monkeypatch.setattr(pwd, "getpwuid", lambda user: {}[user])
    with pytest.raises(BuildError, match="no home folder: name one with FA4_EXT_CACHE"):
        default_directory()


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


def test_key_depends_on_python_s_minor_version(monkeypatch):
    """It changes a description of the arguments in the objects (docs/building.md)."""
    base = key(FORWARD, "sm_90a", VERSIONS)
    monkeypatch.setattr(sys, "version_info", (*sys.version_info[:2], 99, "final", 0))
    assert key(FORWARD, "sm_90a", VERSIONS) == base
    monkeypatch.setattr(sys, "version_info", (3, 99, 0, "final", 0))
    assert key(FORWARD, "sm_90a", VERSIONS) != base


@pytest.mark.parametrize(
    "setting", ("CUTE_DSL_KEEP_PTX", "FA_CLC", "FLASH_ATTENTION_NUM_SMS", "QUACK_ARCH")
)
def test_settings_that_change_what_is_compiled_do_not_reach_the_compiler(monkeypatch, setting):
    monkeypatch.setenv(setting, "1")
    assert setting not in pool.environment(90)


@pytest.mark.parametrize(
    ("edited", "matters"),
    [("sm90/forward.py", True), ("sm90/tiles.py", True), ("arguments.py", True),
     ("common/symbolic.py", True), ("worker.py", True),
     ("sm90/decode.py", False), ("sm100/forward.py", False), ("kernel.py", False),
     ("configs_sm90.py", False), ("matrix.py", False), ("build.py", False), ("table.py", False),
     ("pool.py", False)],
)  # fmt: skip
def test_key_depends_on_the_sources_that_compile(sources, edited, matters):
    before = key(FORWARD, "sm_90a", VERSIONS, sources)
    with (sources / edited).open("a") as file:
        file.write("edited = True\n")
    assert (key(FORWARD, "sm_90a", VERSIONS, sources) != before) is matters


def test_entries_read_no_table():
    """All that the entries read of a table is in the kernel, and so in the key: another row of a
    table compiles nothing again."""
    tables = {"kernel.py", "matrix.py", "configs_sm90.py", "configs_sm100.py", "rules.py"}
    entries = {kernel.module: kernel for kernel in with_candidates()}
    for kernel in entries.values():
        names = {path.name for path in read_sources(kernel, ROOT / "kernels")}
        assert not names & tables, kernel.module


def test_comments_docstrings_and_layout_compile_nothing_again(sources):
    before = key(FORWARD, "sm_90a", VERSIONS, sources)
    path = sources / "sm90" / "forward.py"
    path.write_text(
        '"""Another sentence."""\n\n\n# a comment\n' + path.read_text().split('"""', 2)[2]
    )
    assert key(FORWARD, "sm_90a", VERSIONS, sources) == before


def test_versions_are_of_what_compiles():
    assert set(source_versions()) == {"flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels"}


def no_package(name):
    raise PackageNotFoundError(name)


@pytest.mark.parametrize("version", [no_package, lambda name: None], ids=["missing", "no_metadata"])
def test_a_package_without_a_version_is_named(monkeypatch, version):
    monkeypatch.setattr("kernels.cache.version", version)
    with pytest.raises(
        BuildError,
        match=r"flash-attn-4 is not installed in .*pip install --no-deps -r requirements/build.txt",
    ):
        source_versions()


def run_build(*arguments, **environment):
    """Runs `python -m kernels.build`, without the environment variables that are None."""
    settings = {
        name: value for name, value in (os.environ | environment).items() if value is not None
    }
    command = [sys.executable, "-m", "kernels.build", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FA4_EXT_CACHE": "/dev/null/x"}, "/dev/null/x can't be the folder of compiled kernels: "
            "Not a directory; name another"),
        ({"FA4_EXT_CACHE": None, "XDG_CACHE_HOME": None, "HOME": "/dev/null"}, "Not a directory; "
            "name another with FA4_EXT_CACHE"),
    ],
    ids=["cache", "home"],
)  # fmt: skip
def test_the_build_says_in_a_line_what_is_wrong_with_its_folder(tmp_path, environment, words):
    done = run_build(f"--out={tmp_path}", **environment)
    assert done.returncode == 1
    assert words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_build_explains_its_options_without_a_home_folder():
    done = run_build("--help", FA4_EXT_CACHE=None, XDG_CACHE_HOME=None, HOME=None)
    assert done.returncode == 0 and "--cache" in done.stdout, done.stderr


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
    if behaviour == "babbles":
        print("loading", flush=True)
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
    assert sorted(
        kernel.name for kernel in compile_with(fake("works"), cache, jobs=jobs)
    ) == sorted(k.name for k in KERNELS[:8])
    for kernel in KERNELS[:8]:
        assert cache.get(kernel.name)[0].decode() == pool.TARGETS[kernel.arch] + str(
            kernel.head_dim
        )


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("dies", r"out of registers\n.*SIGABRT"), ("exits", "exited with status 3"),
        ("babbles", "the compiling process answered 'loading.*, which is not JSON"),
    ],
)  # fmt: skip
def test_a_worker_that_dies_fails_the_build_with_the_kernel_and_its_message(
    cache, behaviour, message
):
    with pytest.raises(
        pool.CompileError, match=rf"kernel sm\w+ failed to compile:\n(.|\n)*{message}"
    ):
        compile_with(fake(behaviour), cache)


def test_a_kernel_that_fails_fails_the_build_with_its_name_and_the_compiler_s_message(cache):
    broken = dataclasses.replace(FORWARD, block_m=100)  # not a multiple of a warpgroup's 64 rows
    with pytest.raises(pool.CompileError) as error:
        compile_with(pool.WORKER, cache, [broken], jobs=1)
    assert f"kernel {broken.name} failed to compile" in str(error.value)
    assert "Error" in str(error.value) and "must be one to three times 64, is 100" in str(
        error.value
    )


PREFIX = f"_mlir_{FORWARD.name}_"
FACTS = {
    "load": PREFIX + "cuda_init", "load_to_device": PREFIX + "cuda_load_to_device",
    "launch": PREFIX + "_mlir_ciface_entry",
    "arguments": list(signature.expected(FORWARD)), "registers": 168, "spill_bytes": 0,
    "products": 32, "waits": 5,
    "shared_memory_bytes": 1000, "object_bytes": 6,
}  # fmt: skip


def collect_with(monkeypatch, cache, facts):
    """Returns what a build takes from a cache that holds these facts about an object, and which
    kernels it compiles, rightly."""
    with cache.workspace() as directory:
        (directory / "kernel.o").write_bytes(b"cached")
        cache.put(FORWARD.name, directory / "kernel.o", facts)
    compiled = []

    def compile_all(kernels, *_):
        compiled.extend(kernels)
        return dict.fromkeys(kernels, (b"anew__", FACTS))

    monkeypatch.setattr(pool, "compile_all", compile_all)
    return build.collect(cache, {FORWARD: FORWARD.name}, jobs=1)[FORWARD], compiled


def test_a_build_takes_true_facts_from_the_cache(monkeypatch, cache):
    assert collect_with(monkeypatch, cache, FACTS) == ((b"cached", FACTS), [])


IMPOSSIBLE = [
    {"load": PREFIX + "cuda_init(void**); int x; //"}, {"load": "other_cuda_init"}, {"load": None},
    {"load": ["name"]},
    {"load": PREFIX + "cuda_init\n"}, {"load_to_device": PREFIX + "cuda_init"},
    {"launch": PREFIX + "_mlir_ciface_\u00e9"},
    {"launch": PREFIX + "_mlir_ciface_"}, {"launch": "system"}, {"registers": "168"},
    {"registers": -1}, {"registers": True},
    {"spill_bytes": 0.0}, {"products": None}, {"shared_memory_bytes": []}, {"object_bytes": 7},
    {"arguments": None},
    {"arguments": [1]}, {"arguments": "q"}, {"more": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=str)
def test_facts_that_cannot_be_the_kernel_s_are_compiled_again(monkeypatch, cache, change):
    """Whoever wrote them knew how entries are hashed."""
    assert collect_with(monkeypatch, cache, FACTS | change) == ((b"anew__", FACTS), [FORWARD])


@pytest.mark.parametrize("facts", [None, [], "facts", 1, {}, {"load": FACTS["load"]}], ids=str)
def test_what_are_no_facts_is_compiled_again(monkeypatch, cache, facts):
    assert collect_with(monkeypatch, cache, facts) == ((b"anew__", FACTS), [FORWARD])


def test_a_compiler_that_answers_with_impossible_facts_fails_the_build_with_the_kernel_s_name(
    monkeypatch, cache
):
    monkeypatch.setattr(
        pool, "compile_all", lambda *_: {FORWARD: (b"object", FACTS | {"launch": "system"})}
    )
    with pytest.raises(
        pool.CompileError,
        match=f"kernel {FORWARD.name} failed .*\n.*launch must be {PREFIX}.*, is 'system'",
    ):
        build.collect(cache, {FORWARD: FORWARD.name}, jobs=1)


BUILD = """
import sys
from pathlib import Path
from kernels.cache import Cache
from test_build_cache import compile_with, fake
compile_with(fake(sys.argv[2]), Cache(Path(sys.argv[1])))
"""


def start_build(directory, behaviour):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(directory), behaviour],
        env={**os.environ, "PYTHONPATH": path},
    )


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
    assert {
        json.loads(path.read_text())["facts"]["registers"]
        for path in cache.directory.glob("*/*.json")
    } == {1}
