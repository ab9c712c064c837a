"""Compiles the kernels and writes what the C++ build needs: `python -m kernels.build --subset core
--out build/kernels`.

Leaves in --out: objects/*.o, objects.txt (their list, for CMake), kernel_table.cpp,
planner_table.cpp (for the tests) and manifest.json.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kernels import facts, limits, matrix, pool, shared_memory, signature, table
from kernels.cache import Cache, default_directory, key, source_versions
from kernels.errors import BuildError
from kernels.kernel import ARCHS, Kernel
from kernels.progress import Progress, duration

VERSION = Path(__file__).parents[1] / "version.txt"


def collect(cache: Cache, keys: dict[Kernel, str], jobs: int) -> dict[Kernel, tuple[bytes, dict]]:
    """The object and the facts of each kernel, compiled where the cache has none that can be
    true."""
    cached = {kernel: cache.get(key) for kernel, key in keys.items()}
    found = {
        kernel: entry
        for kernel, entry in cached.items()
        if entry and not facts.problem(kernel, *entry)
    }
    missing = [kernel for kernel in keys if kernel not in found]
    if missing:
        progress = Progress(len(missing))
        compiled = pool.compile_all(
            missing,
            keys,
            cache,
            jobs,
            lambda kernel: progress.started(kernel.name),
            lambda _: progress.finished(),
        )
        for kernel, entry in compiled.items():
            if problem := facts.problem(kernel, *entry):
                raise pool.CompileError(kernel, problem)
        found |= compiled
    return {kernel: found[kernel] for kernel in keys}


def write(
    out: Path,
    built: Sequence[table.Built],
    objects: dict[str, bytes],
    subset: str,
    archs: Sequence[int],
    versions: dict[str, str],
    commit: str,
) -> None:
    for stale in set((out / "objects").glob("*.o")) - {
        out / "objects" / f"{name}.o" for name in objects
    }:
        stale.unlink()
    for name, content in objects.items():
        table.write_if_different(out / "objects" / f"{name}.o", content)
    rows = table.manifest(built)
    manifest_json = json.dumps(rows, separators=(",", ":"))
    info = table.build_info(
        subset, archs, versions, manifest_json, VERSION.read_text().strip(), commit
    )
    table.write_if_different(
        out / "kernel_table.cpp", table.cpp(built, json.dumps(info), manifest_json)
    )
    table.write_if_different(out / "manifest.json", json.dumps(rows, indent=1) + "\n")
    table.write_if_different(out / "planner_table.cpp", table.planner_cpp())
    table.write_if_different(
        out / "objects.txt", "".join(f"{out.resolve() / 'objects' / name}.o\n" for name in objects)
    )


def build(
    subset: str, archs: Sequence[int], jobs: int, out: Path, cache_directory: Path, commit: str
) -> None:
    begin = time.monotonic()
    kernels = [kernel for kernel in matrix.subset(subset) if kernel.arch in archs]
    for kernel in kernels:
        shared_memory.check_config(kernel)
    versions = source_versions()
    keys = {kernel: key(kernel, pool.TARGETS[kernel.arch], versions) for kernel in kernels}
    entries = collect(Cache(cache_directory), keys, jobs)
    built = [table.Built(kernel, found) for kernel, (_, found) in entries.items()]
    for row in built:
        signature.check(row.kernel, row.facts["arguments"])
        limits.check(row.kernel, row.facts)
        shared_memory.check(row.kernel, row.facts["shared_memory_bytes"])
    write(
        out,
        built,
        {kernel.name: content for kernel, (content, _) in entries.items()},
        subset,
        archs,
        versions,
        commit,
    )
    size = sum(len(content) for content, _ in entries.values()) / 1e6
    took = duration(time.monotonic() - begin)
    print(
        f"{len(kernels)} kernels ({subset}), {size:.1f} MB of objects in {out}, {took}",
        file=sys.stderr,
    )


def _archs(text: str) -> tuple[int, ...]:
    archs = tuple(int(arch) for arch in text.split(",") if arch.isdigit())
    if not archs or set(archs) - set(ARCHS) or len(archs) != len(text.split(",")):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated choice of {', '.join(map(str, ARCHS))}"
        )
    return archs


def _jobs(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.build", description="Compile the kernels and generate their table."
    )
    parser.add_argument("--subset", choices=matrix.SUBSETS, default="core")
    parser.add_argument("--arch", type=_archs, default=ARCHS, help="e.g. 90,100 (the default)")
    parser.add_argument(
        "--jobs",
        type=_jobs,
        default=len(os.sched_getaffinity(0)),
        help="compiling processes (one a core)",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--commit",
        default="unknown",
        help="of the sources, for build_info() (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="of compiled kernels (default: $FA4_EXT_CACHE or ~/.cache/fa4_ext/kernels)",
    )
    given = parser.parse_args(arguments)
    try:
        build(
            given.subset,
            given.arch,
            given.jobs,
            given.out,
            given.cache or default_directory(),
            given.commit,
        )
    except (BuildError, ValueError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the kernels compiled so far stay in the cache", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
