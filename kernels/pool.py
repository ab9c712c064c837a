"""Compiles kernels in worker processes, one at a time in each slot, from a queue that they
share."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from kernels.cache import Cache
from kernels.errors import BuildError
from kernels.kernel import Kernel
from kernels.worker import OBJECT

TARGETS = {90: "sm_90a", 100: "sm_100f"}  # 100f: the family, compute capability 10.0 and 10.3
WORKER = (sys.executable, "-m", "kernels.worker")


class CompileError(BuildError):
    def __init__(self, kernel: Kernel, message: str):
        super().__init__(f"kernel {kernel.name} failed to compile:\n{message}")


def environment(arch: int) -> dict[str, str]:
    """The caller's environment without what would change the compiler's output."""
    settings = ("CUTE_DSL_", "FA_", "FLASH_ATTENTION_", "QUACK_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **kept, "PYTHONPATH": path, "CUTE_DSL_ARCH": TARGETS[arch], "CUTE_DSL_NO_CACHE": "1",
        "FLASH_ATTENTION_ARCH": f"sm_{arch}",
    }  # fmt: skip


class Worker:
    def __init__(self, arch: int, command: Sequence[str]):
        self.arch = arch
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            command,
            env=environment(arch),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout

    def _printed(self) -> str:
        self.log.seek(self.start)
        return self.log.read().strip()

    def compile(self, kernel: Kernel, directory: Path) -> dict:
        self.start = self.log.seek(0, os.SEEK_END)
        request = json.dumps({"kernel": asdict(kernel), "directory": str(directory)})
        with contextlib.suppress(BrokenPipeError):  # it died before; its exit status says how
            print(request, file=self.requests, flush=True)
        answer = self.answers.readline()
        if not answer:
            status = self.process.wait()
            ending = (
                f"was killed by {signal.Signals(-status).name}"
                if status < 0
                else f"exited with status {status}"
            )
            raise CompileError(kernel, f"{self._printed()}\nthe compiling process {ending}")
        try:
            facts = json.loads(answer)
        except ValueError as error:
            raise CompileError(
                kernel, f"the compiling process answered {answer!r:.200}, which is not JSON"
            ) from error
        if "error" in facts:
            raise CompileError(kernel, f"{self._printed()}\n{facts['error']}".strip())
        return facts

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.requests.close()
        self.answers.close()
        self.log.close()


class Queue:
    """The kernels left to compile, by architecture, so that a slot seldom needs another worker."""

    def __init__(self, kernels: Sequence[Kernel]):
        self.lock = threading.Lock()
        self.left = {
            arch: [kernel for kernel in reversed(kernels) if kernel.arch == arch]
            for arch in TARGETS
        }
        self.slots = dict.fromkeys(TARGETS, 0)  # that work on an architecture

    def take(self, arch: int | None) -> Kernel | None:
        """The next kernel. It is one of `arch` while there are any, else one of the architecture
        with the most left for each slot."""
        with self.lock:
            if arch is None or not self.left[arch]:
                if arch is not None:
                    self.slots[arch] -= 1
                arch = max(TARGETS, key=lambda arch: len(self.left[arch]) / (1 + self.slots[arch]))
                self.slots[arch] += 1
            return self.left[arch].pop() if self.left[arch] else None


def compile_all(
    kernels: Sequence[Kernel],
    keys: dict[Kernel, str],
    cache: Cache,
    jobs: int,
    started: Callable[[Kernel], None],
    finished: Callable[[Kernel], None],
    command: Sequence[str] = WORKER,
) -> dict[Kernel, tuple[bytes, dict]]:
    """Compiles into the cache, and returns the objects and the facts about them.

    Raises:
        CompileError: of the first kernel that fails, which stops the others.
    """
    queue, stop = Queue(kernels), threading.Event()
    compiled = {}

    def serve() -> None:
        worker = None
        try:
            while not stop.is_set() and (kernel := queue.take(worker.arch if worker else None)):
                if worker is None or worker.arch != kernel.arch:
                    if worker:
                        worker.close()
                    worker = Worker(kernel.arch, command)
                started(kernel)
                with cache.workspace() as directory:
                    facts = worker.compile(kernel, directory)
                    compiled[kernel] = cache.put(keys[kernel], directory / OBJECT, facts)
                finished(kernel)
        finally:
            if worker:
                worker.close()

    with ThreadPoolExecutor(jobs) as slots:
        served = [slots.submit(serve) for _ in range(min(jobs, len(kernels)))]
        try:
            for slot in as_completed(served):
                slot.result()
        finally:
            stop.set()
    return compiled
