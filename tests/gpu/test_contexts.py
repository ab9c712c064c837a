"""Results are right in CUDA contexts and streams that have a part of the device, on the part's SMs.

The scripts make green contexts by the driver's own functions, and by PyTorch's class where it has
one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from textwrap import dedent

import pytest
import torch
from fresh_process import run_script

PREAMBLE = """
    import ctypes
    from dataclasses import replace
    import torch
    from calls import run_flash
    from cases import dense, make_inputs, varlen
    from compare import assert_matches_reference
    import fa4_ext

    fa4_ext.register(fallback="error", speed_rules=False)
    cuda = ctypes.CDLL("libcuda.so.1")

    PROBLEMS = {
        "few queries": (dense(1, 4000, batch=1, heads=8, heads_kv=1), False),
        "few queries of a batch": (dense(2, 900, batch=5, heads=8, heads_kv=4, head_dim=64), False),
        "few packed queries": (
            varlen((1, 2, 1), (3000, 7, 500), heads=8, heads_kv=2, is_causal=True), False,
        ),
        "many queries": (dense(700, 700, is_causal=True), True),
        "packed": (varlen((300, 129, 7), heads=4, heads_kv=2, is_causal=True), True),
        "window": (dense(300, 300, head_dim=64, window=(37, 21)), True),
    }

    def check(where):
        for name, (problem, backward) in PROBLEMS.items():
            x = make_inputs(problem)
            torch.cuda.synchronize()
            try:
                result = run_flash(problem, x, backward=backward)
            except RuntimeError as error:
                raise AssertionError(f"{name}, {where}: {error}")
            torch.cuda.synchronize()
            compare(problem, x, result)

    def compare(problem, x, result):
        # On the CPU: cuBLAS, whose handle is the primary context's, was seen to compute NaN in a
        # part of the device.
        def on_cpu(t):
            return replace(t, **{name: v.cpu() for name, v in vars(t).items() if v is not None})

        assert_matches_reference(problem, on_cpu(x), on_cpu(result))

    def call(function, *arguments):
        status = getattr(cuda, function)(*arguments)
        assert status == 0, f"{function}: {status}"

    def green(sm_count):
        whole, parts, rest = (ctypes.create_string_buffer(4096) for _ in range(3))
        call("cuDeviceGetDevResource", 0, whole, 1)
        count = ctypes.c_uint(1)
        split = (parts, ctypes.byref(count), whole, rest, 0, sm_count)
        call("cuDevSmResourceSplitByCount", *split)
        descriptor, context = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuDevResourceGenerateDesc", ctypes.byref(descriptor), parts, 1)
        call("cuGreenCtxCreate", ctypes.byref(context), descriptor, 0, 1)
        return context

    def stream_of(context):
        stream = ctypes.c_void_p()
        call("cuGreenCtxStreamCreate", ctypes.byref(stream), context, 1, 0)
        return torch.cuda.ExternalStream(stream.value)

    class current:
        def __init__(self, context):
            self.context = ctypes.c_void_p()
            call("cuCtxFromGreenCtx", ctypes.byref(self.context), context)
        def __enter__(self):
            call("cuCtxPushCurrent_v2", self.context)
        def __exit__(self, *exception):
            call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    torch.zeros(1, device="cuda")
"""

SCRIPTS = {
    "used_before": """
        check("whole device")
        for size in (8, 16, 40):
            context = green(size)
            with torch.cuda.stream(stream_of(context)):
                check(f"stream of {size}")
            with current(context):
                check(f"context of {size} current")
        check("whole device again")
    """,
    "first_used_there": """
        with torch.cuda.stream(stream_of(green(16))):
            check("stream of 16")
        check("whole device")
    """,
    "first_used_where_it_is_current": """
        with current(green(16)):
            check("context of 16 current")
        check("whole device")
    """,
    "several_and_one_destroyed": """
        first, second = green(16), green(24)
        for context in (first, second, first):
            with current(context):
                check("one of two")
        call("cuGreenCtxDestroy", first)
        third = green(8)
        for context in (second, third):
            with current(context):
                check("after another was destroyed")
        check("whole device")
    """,
    "captured": """
        problem = dense(1, 4000, batch=1, heads=8, heads_kv=1)
        x = make_inputs(problem)
        stream = stream_of(green(16))
        run_flash(problem, x, backward=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = run_flash(problem, x, backward=False)
        with torch.cuda.stream(stream):
            graph.replay()
        torch.cuda.synchronize()
        compare(problem, x, result)
    """,
    "by_pytorch": """
        from torch.cuda.green_contexts import GreenContext
        context = GreenContext.create(num_sms=16, device_id=0)
        check("whole device")
        context.set_context()
        check("PyTorch's green context of 16")
        context.pop_context()
        check("whole device again")
    """,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_green_context(script):
    if script == "by_pytorch" and not torch.cuda.green_contexts.SUPPORTED:
        pytest.skip("this PyTorch has no green contexts")
    run_script(dedent(PREAMBLE) + dedent(SCRIPTS[script]), timeout=300)


@pytest.mark.skipif(
    shutil.which("nvidia-cuda-mps-control") is None, reason="needs nvidia-cuda-mps-control"
)
@pytest.mark.parametrize("share", (10, 30, 75))
def test_a_share_of_the_device_under_mps(share, tmp_path):
    """The share, in percent, is what the driver says that the device has. A daemon that sees a part
    of the devices would number them anew, so that CUDA_VISIBLE_DEVICES=1 names none to its clients.
    """
    folders = {f"CUDA_MPS_{name}_DIRECTORY": str(tmp_path / name) for name in ("PIPE", "LOG")}
    for folder in folders.values():
        os.mkdir(folder)
    environment = {**os.environ, **folders}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, check=True)
    try:
        run_script(
            dedent(PREAMBLE) + 'check("a share under MPS")\n', timeout=300, **folders,
            CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=str(share),
        )  # fmt: skip
    finally:
        subprocess.run(
            ["nvidia-cuda-mps-control"], input="quit\n", text=True, env=environment, check=False
        )
