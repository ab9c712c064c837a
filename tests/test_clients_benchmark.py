"""Runs the workloads of benchmarks/clients on the CPU, tiny and in fp32, so that a GPU's minutes
are not spent on finding that one does not run, and checks what the benchmark makes of its
results."""

from __future__ import annotations

import json
import os
import signal
import sys

import math_ops
import pytest
import torch

from benchmarks.clients import __main__ as command
from benchmarks.clients import kernels, report
from benchmarks.clients.child import REFERENCE, errors
from benchmarks.clients.contenders import CONTENDERS
from benchmarks.clients.workload import Place
from benchmarks.clients.workloads import WORKLOADS

PLACE = Place("cpu", torch.float32, tiny=True)
# PyTorch has no kernel for it on the CPU.
ON_CPU = {name: one for name, one in WORKLOADS.items() if name != "varlen_attn"}
INTEGRATED = [name for name, one in ON_CPU.items() if "fa4_ext" in one.contenders]


@pytest.fixture
def covered_on_the_cpu(monkeypatch):
    """Lets the integration take what math_ops.py computes."""
    from fa4_ext.integrations.transformers import attention

    monkeypatch.setitem(attention.DTYPES, "cpu", (torch.float32,))


def results(name: str, contender: str) -> dict[str, torch.Tensor]:
    chosen = CONTENDERS[contender]
    with chosen.enter():
        return WORKLOADS[name].make(chosen.implementation, PLACE)()


def slow(names) -> list:
    return [
        pytest.param(name, marks=pytest.mark.long if WORKLOADS[name].compiled else ())
        for name in names
    ]


@pytest.mark.parametrize("name", slow(INTEGRATED))
@pytest.mark.usefixtures("covered_on_the_cpu")
def test_an_integrated_workload_gives_what_it_gives_without(name):
    workload = WORKLOADS[name]
    without = results(name, "eager" if workload.eager else "torch")
    math_ops.calls.clear()
    ours = results(name, "fa4_ext")
    assert math_ops.calls, "no attention call came to fa4_ext"
    assert ours.keys() == without.keys() and ours
    for result, error in errors(ours, without).items():
        assert error < 1e-5, f"{result}: {error:.1e} of the norm"


@pytest.mark.parametrize("name", slow(name for name in ON_CPU if name not in INTEGRATED))
def test_a_workload_without_an_integration_runs(name):
    found = results(name, "torch")
    assert found and all(one.isfinite().all() for one in found.values())


@pytest.mark.parametrize("name", slow(WORKLOADS))
def test_a_workload_is_the_same_each_time(name):
    """Contenders run in processes of their own, and are compared with one truth."""
    contender = "eager" if WORKLOADS[name].eager else "torch"
    first, second = (results(name, contender) for _ in range(2))
    for result, error in errors(second, first).items():
        assert error < 1e-5, f"{result}: {error:.1e} of the norm"


def test_the_reference_of_a_workload_comes_before_its_contenders():
    found = command.tasks(["llama 8k", "gpt-oss prefill"], [*CONTENDERS], seed=3)
    assert found[0] == ("llama 8k", command.REFERENCE)
    of_second = [one for name, one in found if name == "gpt-oss prefill"]
    assert of_second[0] == command.REFERENCE and set(of_second[1:]) == {"eager", "fa4_ext"}
    assert len(found) == len(set(found)) == 1 + 6 + 1 + 2


@pytest.mark.parametrize(
    ("kernel", "owner"),
    [
        ("kernel_cutlass_kernel_kernels_sm90_forward_flash", "fa4_ext"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "cuDNN"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "FA2"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "efficient"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward_softmax", "math"),
        ("sm90_xmma_gemm_bf16bf16", None),
    ],
)
def test_whose_attention_kernel_it_is(kernel, owner):
    assert kernels.owner(kernel) == owner


RESULTS = {
    "llama": {
        "torch": {
            "step_ms": 20.0, "gpu_ms": 18.0, "attention_ms": {"cuDNN": 4.0},
            "error_over_math": {"hidden": 0.9},
        },
        "flash": {"failed": "RuntimeError: no"},
        "efficient": {
            "step_ms": 30.0, "gpu_ms": 16.0, "attention_ms": {}, "error_over_math": {"hidden": 1.0}
        },
        "fa4_ext": {
            "step_ms": 10.0, "gpu_ms": 8.0, "attention_ms": {"fa4_ext": 3.0, "math": 1.0},
            "error_over_math": {"hidden": 0.8, "dq": 1.05},
        },
        "import": {"failed": "ValueError: too large"},
    },
}  # fmt: skip


def test_the_table_names_what_failed_and_compares_with_the_best():
    _, _, *lines = report.table(RESULTS)
    assert lines == [
        "| llama | import fa4_ext | failed: ValueError: too large | | | | |",
        '| llama | attn_implementation="fa4_ext" | 2.00 | 2.25 | 0.50 | 75% | 1.05 |',
    ]


def test_a_workload_without_a_baseline_has_no_speed():
    results = {"llama": {"fa4_ext": RESULTS["llama"]["fa4_ext"]}}
    assert report.table(results)[2].split("|")[3:6] == [" - ", " - ", " - "]


def test_the_figure_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    header = {"device": "NVIDIA H200", "torch": "2.11.0"}
    report.draw({"header": header, "clients": RESULTS}, str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_contenders_share_no_compiled_graphs(tmp_path):
    folders = {
        command.ContenderProcess(one, tmp_path, []).environment["TORCHINDUCTOR_CACHE_DIR"]
        for one in (REFERENCE, *CONTENDERS)
    }
    assert len(folders) == 1 + len(CONTENDERS)


class Answers:
    """Stands for a contender's process."""

    def __init__(self, contender, *_):
        self.contender = contender

    def start(self):
        pass

    def run(self, name):
        return {} if self.contender == REFERENCE else {name: 1}

    def stop(self):
        pass


def test_a_run_keeps_the_results_of_workloads_that_it_leaves_out(tmp_path, monkeypatch):
    path = tmp_path / "clients.json"
    path.write_text(json.dumps({"header": {}, "clients": RESULTS}))
    monkeypatch.setattr(command, "ContenderProcess", Answers)
    monkeypatch.setattr(command, "header", lambda *_: {"commit": "this"})
    monkeypatch.setattr(command.report, "table", lambda clients: [*clients])
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        sys, "argv", ["clients", "--json", str(path), "--only", "llama 8k", "varlen_attn"]
    )
    command.main()
    written = json.loads(path.read_text())
    assert written["header"] == {"commit": "this"}
    assert written["clients"]["llama"] == RESULTS["llama"]
    assert written["clients"]["varlen_attn"] == {
        "torch": {"varlen_attn": 1},
        "import": {"varlen_attn": 1},
    }
    assert len(written["clients"]["llama 8k"]) == len(WORKLOADS["llama 8k"].contenders)


def test_a_contender_whose_process_ends_has_failed_and_starts_again(tmp_path):
    """With real processes, which share the reference's results."""
    options = ["--device=cpu", "--tiny"]
    processes = [command.ContenderProcess(one, tmp_path, options) for one in (REFERENCE, "torch")]
    truth, torchs = processes
    command.start_all(processes)
    try:
        assert truth.run("small GPT") == {}
        os.kill(torchs.child._process.pid, signal.SIGKILL)
        assert torchs.run("small GPT") == {"failed": "the process ended with signal SIGKILL"}
        found = torchs.run("small GPT")
        assert found["error_over_math"] and max(found["error_over_math"].values()) < 3, found
        assert "Could not run" in torchs.run("varlen_attn")["failed"]  # PyTorch has no CPU kernel
    finally:
        for process in processes:
            process.stop()
