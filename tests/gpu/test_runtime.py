"""Kernels in the midst of a program: graphs, streams, threads, tensors that are huge."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from calls import flash_backward, flash_forward, run_autograd, run_flash
from cases import DEVICE, Inputs, dense, make_inputs
from compare import assert_close, assert_lse, assert_matches_reference
from fresh_process import run_script
from graphs import capture
from reference import Result, compute

import fa4_ext

GIB = 2**30

FIRST_CALL_IN_A_GRAPH = """
    import torch
    import fa4_ext
    from calls import flash_backward, flash_forward
    from cases import dense, make_inputs
    from compare import assert_matches_reference
    from reference import Result

    fa4_ext.register(fallback="error", speed_rules=False)
    problem = dense(239, 461, is_causal=True, heads=4, heads_kv=2)
    inputs = make_inputs(problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="{mode}"):
        forward = flash_forward(problem, inputs)
        gradients = flash_backward(problem, inputs, forward)
    for replay in range(2):
        for name, fresh in vars(make_inputs(problem)).items():
            if fresh is not None:
                getattr(inputs, name).copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert_matches_reference(problem, inputs, Result(*forward[:2], *gradients))
"""


@pytest.mark.parametrize("mode", ("global", "thread_local", "relaxed"))
def test_first_call_of_a_process_is_captured(mode):
    """Loading a kernel's module must not break the capture that it happens in."""
    run_script(FIRST_CALL_IN_A_GRAPH.format(mode=mode))


@pytest.mark.usefixtures("strict")
def test_training_step_in_a_graph():
    """Forward and autograd run in one graph, which is replayed on other values."""
    problem = dense(512, 512, is_causal=True)
    inputs = make_inputs(problem)
    q, k, v = (t.transpose(1, 2).requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    do = inputs.do.transpose(1, 2)

    def step():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out, *torch.autograd.grad(out, (q, k, v), do)

    graph, outputs = capture(step)
    for _ in range(2):
        fresh = make_inputs(problem)
        with torch.no_grad():
            for name in ("q", "k", "v", "do"):
                getattr(inputs, name).copy_(getattr(fresh, name))
        graph.replay()
        out, *gradients = (t.detach().transpose(1, 2) for t in outputs)
        assert_matches_reference(problem, fresh, Result(out, None, *gradients), check_lse=False)


def _many_problems():
    return [
        dense(s, s, heads=4, heads_kv=heads_kv, head_dim=head_dim, is_causal=causal)
        for s, heads_kv, head_dim, causal in (
            (512, 4, 128, True),
            (799, 2, 64, False),
            (1023, 1, 128, False),
            (300, 4, 64, True),
        )
    ]


@pytest.mark.usefixtures("strict")
def test_two_streams():
    """Calls that overlap on the device don't share scratch memory."""
    problems = _many_problems()[:2]
    cases = [(problem, make_inputs(problem)) for problem in problems]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, (problem, inputs) in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                forward = flash_forward(problem, inputs)
                results.append(
                    (
                        problem,
                        inputs,
                        Result(*forward[:2], *flash_backward(problem, inputs, forward)),
                    )
                )
    torch.cuda.synchronize()
    for problem, inputs, result in results:
        assert_matches_reference(problem, inputs, result)


@pytest.mark.usefixtures("strict")
def test_backward_from_another_stream():
    """Autograd runs the backward on the forward's streams, here two, whatever stream asks for
    it."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    calls = []
    for stream, problem in zip(streams, _many_problems(), strict=False):
        inputs = make_inputs(problem)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            leaves = [t.transpose(1, 2).requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
            gqa = problem.heads != problem.heads_kv
            out = F.scaled_dot_product_attention(
                *leaves, is_causal=problem.is_causal, enable_gqa=gqa
            )
        calls.append((problem, inputs, leaves, out))
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    torch.autograd.backward(
        [out for *_, out in calls], [inputs.do.transpose(1, 2) for _, inputs, _, _ in calls]
    )
    for problem, inputs, leaves, out in calls:
        out, *gradients = (
            t.detach().transpose(1, 2) for t in (out, *(leaf.grad for leaf in leaves))
        )
        assert_matches_reference(problem, inputs, Result(out, None, *gradients), check_lse=False)


def _in_threads(count: int, work) -> None:
    errors = []
    barrier = threading.Barrier(count)

    def run(index):
        barrier.wait()
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                work(index)
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    "run", (run_flash, partial(run_autograd, backend=None)), ids=("aten", "autograd")
)
def test_threads(run):
    """Plain F.sdpa runs under autograd; `sdpa_kernel` switches backends for all threads."""
    problems = _many_problems()

    def work(index):
        problem = problems[index]
        for _ in range(5):
            inputs = make_inputs(problem)
            assert_matches_reference(
                problem, inputs, run(problem, inputs, backward=True), check_lse=run is run_flash
            )

    _in_threads(len(problems), work)


@pytest.mark.usefixtures("strict")
def test_threads_beside_registrations():
    """A handle that lives makes others safe beside running calls."""
    problems = _many_problems()
    over = threading.Event()

    def work(index):
        if index == len(problems):
            while not over.is_set():
                fa4_ext.register(fallback="error", speed_rules=False).remove()
            return
        try:
            for _ in range(200):
                inputs = make_inputs(problems[index])
                result = run_flash(problems[index], inputs, backward=True)
            assert_matches_reference(problems[index], inputs, result)
        finally:
            over.set()

    _in_threads(len(problems) + 1, work)


@pytest.mark.usefixtures("strict")
def test_backward_of_one_graph_from_many_threads():
    problem = dense(512, 512, heads=4, heads_kv=2, is_causal=True)
    inputs = make_inputs(problem)
    leaves = [t.transpose(1, 2).requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    torch.cuda.synchronize()

    def work(_index):
        for _ in range(5):
            own = replace(inputs, do=torch.randn_like(inputs.do))
            gradients = torch.autograd.grad(out, leaves, own.do.transpose(1, 2), retain_graph=True)
            first, *rest = (t.detach().transpose(1, 2) for t in (out, *gradients))
            assert_matches_reference(problem, own, Result(first, None, *rest), check_lse=False)

    _in_threads(4, work)


def test_first_calls_of_a_process_from_many_threads():
    """Eight threads load the same module lazily at once."""
    run_script("""
        import torch
        import fa4_ext
        from calls import run_flash
        from cases import dense, make_inputs
        from compare import assert_matches_reference
        from test_runtime import _in_threads

        fa4_ext.register(fallback="error", speed_rules=False)
        problem = dense(300, 300, is_causal=True)
        inputs = [make_inputs(problem) for _ in range(8)]
        torch.cuda.synchronize()
        results = [None] * 8

        def work(index):
            results[index] = run_flash(problem, inputs[index], backward=True)

        _in_threads(8, work)
        for x, result in zip(inputs, results):
            assert_matches_reference(problem, x, result)
    """)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.usefixtures("strict")
def test_current_device_is_another():
    problem = dense(239, 461, is_causal=True)
    inputs = make_inputs(problem)
    there = Inputs(*(t.to("cuda:1") for t in (inputs.q, inputs.k, inputs.v, inputs.do)))
    with torch.cuda.device(0):
        forward = flash_forward(problem, there)
        gradients = flash_backward(problem, there, forward)
    assert {t.device for t in (*forward, *gradients)} == {torch.device("cuda:1")}
    assert_matches_reference(problem, there, Result(*forward[:2], *gradients))


def _needs(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free / GIB:.0f} are free")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dim", ("batch", "rows", "heads"))
def test_strides_beyond_int32(dim):
    """There are few elements, with 2^31 and more between them."""
    _needs(12)
    problem = dense(129, 129, batch=2, heads=2, heads_kv=2, is_causal=True)
    batch, rows, heads, head_dim = problem.shape("q")
    far = 2**31 + 1024
    strides = {
        "batch": (far, 4 * heads * head_dim, head_dim, 1),
        "rows": (4 * heads * head_dim, far // 128 // 8 * 8, head_dim, 1),
        "heads": (4 * rows * head_dim, 4 * head_dim, far, 1),
    }[dim]
    reach = 1 + sum(
        (size - 1) * stride
        for size, stride in zip((batch, rows, heads, head_dim), strides, strict=True)
    )
    memory = torch.empty(reach + 4 * head_dim * heads, dtype=problem.dtype, device=DEVICE)
    inputs = make_inputs(problem)
    step = {"batch": heads * head_dim, "rows": heads * head_dim, "heads": head_dim}[dim]
    views = []
    for index, tensor in enumerate((inputs.q, inputs.k, inputs.v, inputs.do)):
        view = memory.as_strided(tensor.shape, strides, index * step)
        view.copy_(tensor)
        views.append(view)
    far_inputs = Inputs(*views)
    forward = flash_forward(problem, far_inputs)
    result = Result(*forward[:2], *flash_backward(problem, far_inputs, forward))
    assert_matches_reference(problem, inputs, result)


@pytest.mark.usefixtures("strict")
def test_more_than_2_31_elements():
    """Every tensor of the query's side has more than 2^31 elements; the last head of the last batch
    entry is compared."""
    _needs(48)
    problem = dense(16384, 16384, batch=9, heads=128, heads_kv=1, is_causal=True, window=(256, -1))
    inputs = make_inputs(problem)
    assert inputs.q.numel() > 2**31
    out, lse, *rest = flash_forward(problem, inputs)
    dq, _, _ = flash_backward(problem, inputs, (out, lse, *rest))
    last = dense(16384, 16384, batch=1, heads=1, heads_kv=1, is_causal=True, window=(256, -1))
    part = Inputs(*(t[-1:, :, -1:].clone() for t in (inputs.q, inputs.k, inputs.v, inputs.do)))
    results = out[-1:, :, -1:].clone(), lse[-1:, -1:].clone(), dq[-1:, :, -1:].clone()
    del inputs, out, lse, rest, dq
    torch.cuda.empty_cache()
    truth = compute(last, part, torch.float32, backward=True)
    plain = compute(last, part, last.dtype, backward=True)
    assert_close("out", results[0], plain.out, truth.out)
    assert_lse(results[1], truth.lse)
    assert_close("dq", results[2], plain.dq, truth.dq)
