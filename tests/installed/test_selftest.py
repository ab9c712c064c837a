"""python -m fa4_ext selftest without a GPU: what becomes of children that hang, crash or answer
wrong, what counts as wrong, and what is reported."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
from processes import python

import fa4_ext
from fa4_ext import _environment, _library
from fa4_ext.__main__ import main
from fa4_ext.selftest import attempt, command, report
from fa4_ext.selftest.compare import what_is_wrong
from fa4_ext.selftest.problems import CALLED, problems_for
from fa4_ext.selftest.reference import DTYPES, compute, make_inputs
from fa4_ext.selftest.supervisor import CRASHED, HUNG, Limits, Outcome, supervise

KERNELS = _library.manifest()
ARCHS = fa4_ext.build_info()["archs"]
ARCH = ARCHS[0]
LIMITS = Limits(start=20, kernel=2)

# A child that does what the name of a kernel says, and tells its own number by the detail.
CHILD = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    name = line.strip()
    if name == "hangs":
        time.sleep(1000)
    if name == "aborts":
        print("something is broken", file=sys.stderr)
        os.abort()
    if name == "exits":
        sys.exit(3)
    status = {"is wrong": "wrong", "fails": "failed"}.get(name, "right")
    print(json.dumps({"status": status, "detail": str(os.getpid())}), flush=True)
    if status == "failed":
        break
"""


def fake(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def outcomes(*names: str, code: str = CHILD) -> list[Outcome]:
    return list(supervise(fake(code), names, LIMITS))


def test_a_hung_kernel_is_killed_and_the_next_goes_on_in_a_fresh_process():
    begin = time.monotonic()
    first, second, hung, after, last = outcomes("a", "b", "hangs", "c", "d")
    assert [outcome.status for outcome in (first, second, hung, after, last)] == [
        "right", "right", HUNG, "right", "right",
    ]  # fmt: skip
    assert hung.detail == "no answer in 2 s" and 2 <= hung.seconds < 10, hung
    assert first.detail == second.detail != after.detail == last.detail
    assert time.monotonic() - begin < 30


def test_a_killed_process_is_gone():
    _, hung, _ = outcomes("a", "hangs", "b")
    first, _, _ = outcomes("a", "hangs", "b")
    assert hung.status == HUNG
    with pytest.raises(ProcessLookupError):
        os.kill(int(first.detail), 0)


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("aborts", "the process ended with signal SIGABRT: something is broken"),
        ("exits", "the process ended with exit status 3"),
    ],
)
def test_a_crash_takes_only_its_kernel_along(name, detail):
    before, crashed, after = outcomes("a", name, "b")
    assert (crashed.status, crashed.detail) == (CRASHED, detail)
    assert before.status == after.status == "right" and before.detail != after.detail


def test_a_failed_call_counts_as_a_crash_and_ends_its_process():
    before, failed, after = outcomes("a", "fails", "b")
    assert failed.status == CRASHED and failed.detail == before.detail != after.detail


def test_a_wrong_kernel_does_not_end_its_process():
    before, wrong, after = outcomes("a", "is wrong", "b")
    assert wrong.status == "wrong" and before.detail == wrong.detail == after.detail


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("import sys; sys.exit('CUDA does not start')", "exit status 1: CUDA does not start"),
        ("import time; time.sleep(1000)", "no answer in 1 s"),
    ],
)
def test_where_no_child_starts_the_kernels_are_not_run(code, detail):
    begin = time.monotonic()
    found = list(supervise(fake(code), ("a", "b"), replace(LIMITS, start=1)))
    assert [outcome.status for outcome in found] == ["not run"] * 2
    assert all(detail in outcome.detail for outcome in found), found
    assert time.monotonic() - begin < 15


def test_names_without_kernels_start_no_child():
    assert list(supervise(["/no/such/program"], (), LIMITS)) == []


def called(op: str) -> dict:
    return next(kernel for kernel in KERNELS if kernel["op"] == op)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_math_in_the_kernel_s_dtype_is_right_and_what_differs_from_it_is_not(op):
    kernel = called(op)
    for problem in problems_for(kernel):
        if max(problem.seqlens_k) > 600 or problem.heads > 8:
            continue
        torch.manual_seed(0)
        inputs = make_inputs(problem, "cpu")
        truth = compute(problem, inputs, torch.float32)
        plain = compute(problem, inputs, DTYPES[problem.dtype])
        names = ("dq", "dk", "dv") if problem.backward else ("out", "lse")
        # The kernels' lse is of scores in fp32.
        ours = {name: (truth if name == "lse" else plain)[name].contiguous() for name in names}
        assert what_is_wrong(ours, plain, truth) is None, str(problem)
        for name in names:
            off = ours[name].clone()
            off.view(-1)[off.numel() // 2] += 1.0
            if torch.equal(off, ours[name]):  # a row that sees no key has an lse of -inf
                continue
            wrong = what_is_wrong(ours | {name: off}, plain, truth)
            assert wrong and wrong.startswith(f"{name}: error "), (str(problem), wrong)
            off = ours[name].clone()
            off.view(-1)[0] = float("nan")
            wrong = what_is_wrong(ours | {name: off}, plain, truth)
            assert wrong and "isnan differs in 1 of" in wrong, (str(problem), wrong)
            wrong = what_is_wrong(ours | {name: off[:1].clone()}, plain, truth)
            assert wrong and ("shape" in wrong or "isnan" in wrong), (str(problem), wrong)


def test_rows_behind_the_last_sequence_are_nan_and_their_gradients_zero():
    kernel = next(k for k in KERNELS if k["op"] == "backward" and k["layout"] == "varlen")
    problem = next(problem for problem in problems_for(kernel) if problem.rows_behind)
    inputs = make_inputs(problem, "cpu")
    own = sum(problem.seqlens_k)
    assert inputs.k[own:].isnan().all() and not inputs.k[:own].isnan().any()
    gradient = compute(problem, inputs, torch.float32)["dk"]
    assert gradient.shape == inputs.k.shape and (gradient[own:] == 0).all()
    assert not gradient.isnan().any()


@pytest.mark.parametrize("op", CALLED)
def test_the_library_plans_each_problem_on_its_kernel(op):
    """Every kernel of this build, as the child asks before it runs one."""
    for kernel in (kernel for kernel in KERNELS if kernel["op"] == op):
        where = attempt.Where("meta", capability=kernel["arch"], sm_count=132)
        with attempt.alone(kernel, KERNELS):
            for problem in problems_for(kernel):
                inputs = make_inputs(problem, "cpu")
                on_meta = {
                    name: None if tensor is None else tensor.to("meta")
                    for name, tensor in vars(inputs).items()
                }
                reason = attempt.why_not_run(kernel, problem, replace(inputs, **on_meta), where)
                assert reason is None, (kernel["name"], str(problem), reason)


def test_a_kernel_that_no_problem_gets_to_is_not_run():
    kernel = called("forward") | {"name": "sm90_forward_of_nobody"}
    where = attempt.Where("cpu", capability=kernel["arch"], sm_count=132)
    status, detail = attempt.attempt(kernel, KERNELS, where)
    assert status == "not run" and "the planner says that" in detail, detail
    query = torch.empty(2, 8, 4096, 128, dtype=torch.bfloat16, device="meta")
    found = fa4_ext.explain(query, query, query, device_capability=divmod(ARCH, 10))
    assert found.supported, f"nothing stays disabled: {found}"


@pytest.fixture
def on_a_made_up_gpu(monkeypatch):
    """The command finds a GPU, whose kernels are names that CHILD is told to act on."""

    def act(**acts: str) -> None:
        by_act = {kernel: name.replace("_", " ") for name, kernel in acts.items()}
        code = CHILD.replace("line.strip()", f"{by_act!r}.get(line.strip(), line.strip())")
        capability = {90: (9, 0), 100: (10, 0)}[ARCH]
        made_up = made_report({}, []).facts
        monkeypatch.setattr(command, "_facts", lambda: facts(capability))
        monkeypatch.setattr(command, "facts_of", lambda device: made_up)
        monkeypatch.setattr(command, "child_command", lambda device: fake(code))

    return act


def test_the_command_ends_with_0_where_every_kernel_is_right(on_a_made_up_gpu, output):
    on_a_made_up_gpu()
    assert output("selftest").splitlines()[-1] == "Nothing is wrong"


def test_the_command_ends_with_1_and_names_what_is_broken(on_a_made_up_gpu, capsys, tmp_path):
    hung, crashed, wrong = (kernel["name"] for kernel in BACKWARDS[:3])
    on_a_made_up_gpu(hangs=hung, aborts=crashed, is_wrong=wrong)
    path = tmp_path / "report.json"
    words = ["selftest", "--timeout", "2", "--arch", f"sm{ARCH}", "--json", str(path)]
    assert main([*words, "--kernels", "*_backward_[bf]*"]) == 1  # a dtype follows: not two passes
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == f"FA4_EXT_DISABLE={hung},{crashed},{wrong}"
    assert f"{len(BACKWARDS)}/{len(BACKWARDS)} kernels, 0:" in shown.err
    found = json.loads(path.read_text())
    assert found["disable"] == [hung, crashed, wrong] and not found["ok"]
    status = {row["kernel"]: row["status"] for row in found["kernels"]}
    assert len(status) == len(BACKWARDS)
    assert [status[name] for name in (hung, crashed, wrong)] == [HUNG, CRASHED, "wrong"]


def outcome(kernel: dict, status: str) -> Outcome:
    return Outcome(kernel["name"], status, "" if status == "right" else "it says why", 0.5)


BACKWARDS = [kernel for kernel in KERNELS if kernel["op"] == "backward" and kernel["arch"] == ARCH]


def made_report(statuses: dict[str, str], selected: list[dict]) -> report.Report:
    """Makes the report of a run in which each kernel that is called for got a status."""
    names = report.to_call(selected, KERNELS)
    by_name = {kernel["name"]: kernel for kernel in KERNELS}
    found = [outcome(by_name[name], statuses.get(name, "right")) for name in names]
    facts = {
        "device": "NVIDIA H200",
        "compute_capability": (9, 0),
        "driver": "580.1",
        "torch": "2.11.0",
        "cuda": "13.0",
        "build": fa4_ext.build_info(),
        "seconds": 65.0,
    }
    ops = {kernel["name"]: kernel["op"] for kernel in selected}
    return report.Report(facts, report.with_companions(found, selected, KERNELS), ops)


def test_a_companion_is_right_if_one_backward_with_it_is():
    companion = BACKWARDS[0]["companions"][0]
    with_it = [kernel["name"] for kernel in BACKWARDS if companion in kernel["companions"]]
    selected = [kernel for kernel in KERNELS if kernel["name"] == companion]
    assert report.to_call(selected, KERNELS) == with_it and len(with_it) > 1
    one = made_report(dict.fromkeys(with_it[1:], "wrong"), selected)
    assert [found.status for found in one.outcomes] == ["right"] and one.ok
    none = made_report(dict.fromkeys(with_it, "wrong"), selected)
    (found,) = none.outcomes
    assert found.status == "wrong" and not none.ok
    assert found.detail == f"of the {len(with_it)} kernels that launch it none is right"


def test_the_setting_leaves_out_what_is_broken_and_can_be_registered():
    selected = command.select(KERNELS, ARCH, ["*"])
    forwards = [kernel["name"] for kernel in selected if kernel["op"] == "forward"]
    found = made_report(
        {forwards[0]: "wrong", BACKWARDS[0]["name"]: HUNG, forwards[1]: "not run"}, selected
    )
    assert not found.ok
    assert found.broken == [forwards[0], BACKWARDS[0]["name"]]
    assert report.disable_line(found) == (f"FA4_EXT_DISABLE={forwards[0]},{BACKWARDS[0]['name']}")
    with fa4_ext.register(disable=tuple(found.broken)) as handle:
        assert handle.disable == tuple(found.broken)


def test_the_text_counts_the_kernels_and_tells_of_those_that_are_not_right():
    selected = command.select(KERNELS, ARCH, ["*"])
    text = report.text(made_report({BACKWARDS[0]["name"]: CRASHED}, selected))
    lines = text.splitlines()
    assert f"crashed       {BACKWARDS[0]['name']}" in lines
    (row,) = (line.split() for line in lines if line.startswith("backward "))
    assert row[1:] == [str(len(BACKWARDS) - 1), "0", "0", "1", "0", "0"]
    (row,) = (line.split() for line in lines if line.startswith("all "))
    assert row[1] == str(len(selected) - 1), text
    assert lines[-1] == f"FA4_EXT_DISABLE={BACKWARDS[0]['name']}"
    assert max(map(len, lines)) <= 100
    whole = report.text(made_report({}, selected))
    assert whole.splitlines()[-1] == "Nothing is wrong"
    part = report.text(made_report({BACKWARDS[0]["name"]: "not run"}, selected))
    assert part.splitlines()[-1] == "Nothing is known to be wrong, but not every kernel ran"


def test_the_json_has_what_a_bug_report_needs():
    selected = command.select(KERNELS, ARCH, ["*"])
    found = json.loads(json.dumps(report.as_json(made_report({}, selected))))
    assert list(found) == [
        "ok", "device", "compute_capability", "driver", "torch", "cuda", "build", "seconds",
        "disable", "kernels",
    ]  # fmt: skip
    assert found["ok"] and found["disable"] == [] and len(found["kernels"]) == len(selected)
    assert list(found["kernels"][0]) == ["op", "kernel", "status", "detail", "seconds"]


def facts(*devices: tuple[int, int]) -> _environment.Facts:
    return _environment.Facts("2.13.0", "13.0", 13000, devices)


def test_the_first_gpu_with_kernels_is_taken():
    capability = {90: (9, 0), 100: (10, 3)}[ARCH]
    assert command.find_device(facts((8, 0), capability), None) == (1, ARCH)
    assert command.find_device(facts(capability, capability), ARCH) == (0, ARCH)


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        (facts(), None, "this needs a GPU: this process sees no GPU"),
        (facts((8, 0)), None, "this needs a GPU: GPU 0 is of compute capability 8.0"),
        (facts({90: (9, 0), 100: (10, 0)}[ARCH]), 120, "and of sm120, for which this build"),
        (replace(facts(), driver=None), None, "this needs a GPU: there is no CUDA driver"),
    ],
)
def test_without_a_gpu_for_it_the_error_says_what_is_there(found, wanted, message):
    with pytest.raises(ValueError, match=message):
        command.find_device(found, wanted)


def test_where_cuda_does_not_start_the_error_says_so(monkeypatch):
    def gather(devices):
        raise RuntimeError("CUDA unknown error\nand more")

    monkeypatch.setattr(_environment, "gather", gather)
    with pytest.raises(
        ValueError, match=r"this needs a GPU: CUDA does not start: CUDA unknown error$"
    ):
        command._facts()


def test_patterns_select_kernels_of_the_architecture():
    chosen = command.select(KERNELS, ARCH, [f"sm{ARCH}_backward_*", "*_forward_*"])
    assert {kernel["op"].split("_")[0] for kernel in chosen} == {"forward", "backward"}
    assert {kernel["arch"] for kernel in chosen} == {ARCH}
    with pytest.raises(ValueError, match=f"argument --kernels: 'x_' matches .* sm{ARCH} of this"):
        command.select(KERNELS, ARCH, ["*", "x_*".removesuffix("*")])


def test_a_child_s_environment_leaves_registration_to_the_self_test(monkeypatch):
    monkeypatch.setenv("FA4_EXT_DISABLE", "*")
    variables = command.environment()
    assert "FA4_EXT_DISABLE" not in variables and variables["FA4_EXT_AUTOREGISTER"] == "0"


def test_without_a_gpu_the_command_says_so_and_ends_with_2():
    result = python("-m", "fa4_ext", "selftest")
    assert result.returncode == 2 and result.stdout == ""
    assert "python -m fa4_ext selftest: error: this needs a GPU: " in result.stderr


def test_a_folder_that_is_not_there_is_found_before_anything_runs():
    result = python("-m", "fa4_ext", "selftest", "--json", "/no/such/folder/report.json")
    assert result.returncode == 2 and "there is no such folder" in result.stderr


def test_a_kernel_that_no_backward_of_the_build_launches_is_not_selected():
    companion = BACKWARDS[0]["companions"][0]
    rest = [kernel for kernel in KERNELS if companion not in kernel["companions"]]
    assert companion in {kernel["name"] for kernel in rest}
    chosen = command.select(rest, ARCH, ["*"])
    assert companion not in {kernel["name"] for kernel in chosen}


def test_the_help_fits_a_terminal():
    lines = python("-m", "fa4_ext", "selftest", "--help").stdout.splitlines()
    assert max(map(len, lines)) <= 100, max(lines, key=len)
