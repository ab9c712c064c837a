"""Stands behind the driver of tests/fake_device: runs what the library launches."""

import ctypes
import traceback
from pathlib import Path

import numpy as np

from interpreter.machine import Launch, run
from interpreter.memory import GlobalMemory
from interpreter.program import Program
from interpreter.sources import digest
from kernels import cubin

ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint, ctypes.c_uint,
    ctypes.c_uint,
)  # fmt: skip
ON_ALLOCATION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
POISON = 0xFF  # a NaN in every float dtype


def device_code_at(code: int) -> bytes:
    return cubin.in_fat_binary(lambda begin, size: ctypes.string_at(code + begin, size))


class Device:
    """Acts as the process's GPU from its making on. Kernels are known by the digest of their
    code."""

    def __init__(self, programs: dict[str, str], sm_count: int, capability: int):
        self.sources, self.programs, self.codes = programs, {}, {}
        self.memory = GlobalMemory()
        self.seed, self.lazy = 0, False
        self.fault: str | None = None
        # They are alive as long as the device.
        self.callbacks = ON_LAUNCH(self._launch), ON_ALLOCATION(self._allocated)
        driver = ctypes.CDLL("libcuda.so.1")
        ctypes.c_int.in_dll(driver, "multiprocessors").value = sm_count
        ctypes.c_int.in_dll(driver, "capability").value = capability
        for name, callback in zip(("on_launch", "on_allocation"), self.callbacks, strict=True):
            ctypes.c_void_p.in_dll(driver, name).value = ctypes.cast(
                callback, ctypes.c_void_p
            ).value

    def begin(self, seed: int, lazy: bool) -> None:
        """Begins a call of its own, which may touch its arguments and what it allocates itself."""
        self.memory, self.seed, self.lazy, self.fault = GlobalMemory(), seed, lazy, None

    def add(self, tensors) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.memory.add(storage.data_ptr(), storage.nbytes())

    def _allocated(self, data: int, size: int) -> None:
        if size:
            ctypes.memset(data, POISON, size)
            self.memory.add(data, size)

    def _program(self, code: int) -> Program:
        if code not in self.codes:
            self.codes[code] = digest(device_code_at(code))
        key = self.codes[code]
        if key not in self.programs:
            self.programs[key] = Program(Path(self.sources[key]).read_text())
        return self.programs[key]

    def _launch(self, code, arguments, grid, threads, cluster, shared) -> int:
        try:
            program = self._program(code)
            parameters = np.zeros(program.parameter_bytes, np.uint8)
            for pointer, (begin, size) in zip(arguments, program.parameters, strict=False):
                parameters[begin : begin + size] = np.frombuffer(
                    ctypes.string_at(pointer, size), np.uint8
                )
            self.seed += 1
            run(
                Launch(
                    program,
                    parameters,
                    tuple(grid[:3]),
                    threads,
                    cluster,
                    shared,
                    self.memory,
                    self.seed,
                    self.lazy,
                )
            )
        except Exception:
            # The exception is for whoever made the call, because none passes through C.
            self.fault = traceback.format_exc()
            return 1
        return 0
