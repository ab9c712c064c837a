"""Runs the fuzzer without a GPU, on attention written out on the CPU: what it generates, and that
its checks find what is wrong."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import biases
import pytest
import torch
from cases import Inputs, Problem, dense, varlen
from fuzz.case import OPS, Case, features, parse, runs_on_ours
from fuzz.check import assert_promises
from fuzz.engine import SM_COUNT, explain
from fuzz.faults import FAULTS
from fuzz.generate import cases, generate
from fuzz.ops import TorchOps, run
from fuzz.runner import run_cases
from fuzz.tensors import GRADIENTS, LAYOUTS, forward_arguments, keys_in_use, make_inputs
from reference import compute

import fa4_ext

pytestmark = pytest.mark.skipif(
    90 not in fa4_ext.build_info()["archs"], reason="this build has no kernels for sm90"
)

SEED = 1
FIRST = list(cases(SEED, 5000))
HOPPER = (9, 0)


@cache
def first_with_each_fault() -> dict[str, Case]:
    """The rarest fault is one of 4,000 cases."""
    found = {}
    for case in cases(SEED, 100_000):
        found.setdefault(case.fault, case)
        if found.keys() >= FAULTS.keys():
            break
    return found


def left_out(reason: str) -> bool:
    """Returns whether a kernel is missing in the core subset alone, which the tests without a GPU
    build."""
    too_large = re.search(r"head_dim must be at most .* in this build, is (\d+)", reason)
    if too_large:
        return int(too_large[1]) <= 256
    return "this build's kernel subset" in reason


class TestGenerator:
    def test_same_seed_same_cases(self):
        assert (
            list(cases(SEED, 100)) == FIRST[:100] == [generate(SEED, index) for index in range(100)]
        )
        assert list(cases(SEED + 1, 100)) != FIRST[:100]

    def test_repr_makes_the_case_again(self):
        for case in FIRST:
            assert parse(repr(case)) == case

    def test_every_feature_appears(self):
        seen = {
            feature
            for case in (*FIRST, *first_with_each_fault().values())
            for feature in features(case)
        }
        wanted = {f"op {op}" for op in OPS} | {f"fault {fault}" for fault in FAULTS}
        wanted |= {
            f"layout {layout}"
            for layouts in (LAYOUTS, GRADIENTS)
            for names in layouts.values()
            for layout in names
        }
        wanted |= {
            "dense", "varlen", "bfloat16", "float16", "head dim a multiple of 8",
            "head dim not a multiple of 8", "GQA", "MQA",
            "causal", "causal, top-left, fewer queries", "causal, top-left, more queries",
            "window", "window on one side", "window with causal", "window bound of 0",
            "window bound beyond the keys",
            "window bound below -1", "different lengths", "one query", "more than 1024 rows",
            "empty sequence", "no rows",
            "max above the longest", "unused rows", "scale", "scale of 0", "negative scale",
            "dropout", "debug mask", "seqused_k",
            "backward", "deterministic", "speed rules", "more queries than keys in a window",
            "halves ours-stock",
            "halves stock-ours",
        }  # fmt: skip
        wanted |= {f"bias {kind}" for kind in biases.KINDS}
        wanted |= {f"bias of form {form}" for form in biases.FORMS}
        wanted |= {f"bias in layout {layout}" for layout in (*biases.LAYOUTS, biases.EXPANDED)}
        assert seen == wanted, f"missing {wanted - seen}, not expected {seen - wanted}"

    def test_most_cases_run_on_ours(self):
        share = sum(runs_on_ours(case, 256) for case in FIRST) / len(FIRST)
        assert 0.6 < share < 0.85

    def test_classification_agrees_with_explain(self):
        """On meta tensors, explain agrees where it can be asked without a GPU."""
        asked = 0
        with fa4_ext.register(speed_rules=False):
            for case in FIRST[:800]:
                if case.fault in ("all_on_cpu", "key_on_other_gpu"):
                    continue
                case = replace(case, speed_rules=False)
                arguments = forward_arguments(case, make_inputs(case, "meta"))
                supported, reason = explain(case, arguments, backward=False, capability=HOPPER)
                assert (supported or left_out(reason)) == runs_on_ours(case, 256), (
                    f"{reason or 'supported'}: {case!r}"
                )
                asked += supported
        assert asked > 200

    def test_promises_are_those_of_pytorchs_meta_functions(self):
        """What check.py asks of sizes, strides and dtypes, in every layout, is asked of PyTorch's
        own ops on meta tensors."""
        asked = 0
        for case in FIRST[:500]:
            if case.op == "functional" or case.fault or not runs_on_ours(case, 256):
                continue
            inputs = make_inputs(case, "meta")
            arguments = forward_arguments(case, inputs)
            outcome = run(case, inputs, arguments, TorchOps(), lambda: None, backward=case.backward)
            assert not outcome.error, f"{outcome.error}: {case!r}"
            assert_promises(case, arguments, outcome.results)
            asked += 1
        assert asked > 100

    @pytest.mark.parametrize("name", FAULTS)
    def test_fault_changes_an_argument_and_no_input(self, name):
        if FAULTS[name].devices > 1:
            pytest.skip("needs two GPUs")
        case = first_with_each_fault()[name]
        inputs = make_inputs(case, "cpu")
        right = forward_arguments(replace(case, fault=""), inputs) | {
            "grad_out": inputs.do,
            "out": inputs.q,
        }
        wrong = dict(right)
        FAULTS[name].change(wrong)
        changed = [key for key in right if right[key] is not wrong[key]]
        # On the CPU everything is on the CPU.
        assert changed or name.endswith("on_cpu"), f"{name} changes nothing"
        assert (
            not case.dropout_p
            and not any(case.unused_rows)
            and min(case.problem.seqlens_q + case.problem.seqlens_k) > 0
        )


class Refused(RuntimeError):
    """Stands for an error of PyTorch's kernel."""


def _attention(arguments: dict, do: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Computes `_flash_attention_forward`, and its backward where there is a `do`, by math in
    fp32."""
    q, k, v = (arguments[name].detach() for name in ("query", "key", "value"))
    starts = [arguments[name] for name in ("cum_seq_q", "cum_seq_k")]
    if starts[0] is None:
        seqlens, slack = [(t.shape[1],) * t.shape[0] for t in (q, k)], (0, 0)
    else:
        seqlens = [tuple(t.diff().tolist()) for t in starts]
        slack = tuple(
            arguments[name] - max(lengths)
            for name, lengths in zip(("max_q", "max_k"), seqlens, strict=True)
        )
    window = tuple(
        -1 if bound is None else bound
        for bound in (arguments["window_size_left"], arguments["window_size_right"])
    )
    problem = Problem(
        q.dtype, q.shape[-1], q.shape[-2], k.shape[-2], *seqlens, starts[0] is not None,
        arguments["is_causal"], window,
        arguments["scale"], slack=slack, top_left=arguments.get("top_left", False),
    )  # fmt: skip
    if problem.varlen and arguments["seqused_k"] is not None:
        in_use = tuple(arguments["seqused_k"].tolist())
        k, v = (keys_in_use(problem, in_use, t) for t in (k, v))
        seqlens = seqlens[0], in_use
        problem = replace(problem, seqlens_k=in_use, slack=(slack[0], problem.max_k - max(in_use)))
    first = 0 if starts[0] is None else int(starts[0][0])
    parts = {
        name: t.narrow(0, first, sum(lengths)) if problem.varlen else t
        for name, t, lengths in (
            ("q", q, seqlens[0]),
            ("k", k, seqlens[1]),
            ("v", v, seqlens[1]),
            ("do", do, seqlens[0]),
        )
        if t is not None
    }
    # In the backward of an autograd.Function grad mode is off.
    with torch.enable_grad():
        result = compute(
            problem,
            Inputs(**({"do": None} | parts), bias=arguments.get("attn_mask")),
            torch.float32,
            backward=do is not None,
        )
    whole = {"out": q, "dq": q, "dk": k, "dv": v}
    results = {
        name: torch.zeros_like(t) for name, t in whole.items() if getattr(result, name) is not None
    }
    for name, t in results.items():
        value = getattr(result, name)
        (t.narrow(0, first, value.shape[0]) if problem.varlen else t).copy_(value)
    lse = torch.empty(*q.shape[:-3], q.shape[-2], q.shape[-3])
    lse.narrow(-1, first, result.lse.shape[-1]).copy_(result.lse)
    return results | {"lse": lse}


def _like_op(arguments: dict) -> dict:
    nothing = dict.fromkeys(
        (
            "cum_seq_q",
            "cum_seq_k",
            "window_size_left",
            "window_size_right",
            "seqused_k",
            "alibi_slopes",
        )
    )
    return (
        nothing
        | {"max_q": arguments["query"].shape[-3], "max_k": arguments["key"].shape[-3]}
        | arguments
    )


def _refuse(arguments: dict) -> None:
    """Raises for what no kernel takes. What stands for PyTorch's takes seqused_k of dense tensors,
    and does not look at it."""
    names = ("deterministic", "backward", "speed_rules")
    asked = (
        dict.fromkeys(("block_table", "num_splits"))
        | dict.fromkeys(names, False)
        | {"capability": 90, "sm_count": SM_COUNT}
    )
    given = {"top_left": False} | arguments | {"seqused_k": None}
    by_cudnn = given.pop("top_left") or given.get("attn_mask") is not None
    peer = "cudnn" if by_cudnn else "flash"
    supported, _, reason, *_ = torch.ops.fa4_ext.explain(**given, **asked, peer=peer)
    if not supported and not left_out(reason):
        raise Refused(reason)


class HeadsFirst(torch.autograd.Function):
    """Stands for `_scaled_dot_product_flash_attention`: query, key and value are [batch, heads,
    seqlen, head_dim]."""

    @staticmethod
    def forward(ctx, query, key, value, options):
        tensors = {"query": query, "key": key, "value": value}
        ctx.arguments = _like_op({name: t.transpose(1, 2) for name, t in tensors.items()} | options)
        _refuse(ctx.arguments)
        results = _attention(ctx.arguments)
        ctx.mark_non_differentiable(results["lse"])
        return torch.empty_like(query).copy_(results["out"].transpose(1, 2)), results["lse"]

    @staticmethod
    def backward(ctx, do, _):
        results = _attention(ctx.arguments, do.transpose(1, 2))
        names = {"dq": "query", "dk": "key", "dv": "value"}
        gradients = (
            torch.empty_like(ctx.arguments[like].transpose(1, 2)).copy_(
                results[name].transpose(1, 2)
            )
            for name, like in names.items()
        )
        return *gradients, None


def _others(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns rng_state, unused and the debug mask."""
    return (
        torch.empty(2, dtype=torch.uint64),
        torch.empty((), dtype=torch.uint64),
        query.new_empty(0),
    )


class MathOps:
    """PyTorch's ops by attention written out."""

    def flash_forward(self, **arguments):
        _refuse(arguments)
        results = _attention(arguments)
        return results["out"], results["lse"], *_others(arguments["query"])

    def flash_backward(self, **arguments):
        grad_out, out, query = (arguments.pop(name) for name in ("grad_out", "out", "query"))
        if (
            grad_out is None
            or {grad_out.dtype, out.dtype} != {query.dtype}
            or {grad_out.shape, out.shape} != {query.shape}
        ):
            raise Refused("grad_out or out")
        forward = {
            name: value
            for name, value in arguments.items()
            if name not in ("logsumexp", "rng_state", "unused")
        }
        forward = _like_op({"query": query, "return_debug_mask": False} | forward)
        _refuse(forward)
        results = _attention(forward, grad_out)
        return [results[name] for name in ("dq", "dk", "dv")]

    def inplace_forward(self, *, out, **arguments):
        if (out.shape, out.dtype) != (arguments["query"].shape, arguments["query"].dtype):
            raise Refused("out")
        new, lse, *_ = self.flash_forward(**arguments)
        out.copy_(new)
        return lse

    def sdpa_forward(
        self,
        query,
        key,
        value,
        dropout_p,
        is_causal,
        return_debug_mask,
        scale,
        top_left=False,
        attn_mask=None,
    ):
        options = dict(
            top_left=top_left,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            return_debug_mask=return_debug_mask,
            scale=scale,
        )
        out, lse = HeadsFirst.apply(query, key, value, options)
        return out, lse, None, None, query.shape[2], key.shape[2], *_others(query)

    def functional(self, query, key, value, *, attn_mask, dropout_p, is_causal, scale, enable_gqa):
        head_dim = query.shape[-1]
        top_left = is_causal and query.shape[2] != key.shape[2]
        cudnn = head_dim % 8 == 0 and key.shape[2] > 1
        efficient = head_dim % 8 == 0 and query.shape[1] == key.shape[1]
        by_cudnn = cudnn and not torch.are_deterministic_algorithms_enabled()
        if top_left and not (by_cudnn or efficient):
            raise Refused("top-left")
        padded = (
            torch.nn.functional.pad(t, (0, -head_dim % 8)) if head_dim % 8 else t
            for t in (query, key, value)
        )
        scale = head_dim**-0.5 if scale is None else scale
        options = dropout_p, is_causal, False, scale, top_left, attn_mask
        return self.sdpa_forward(*padded, *options)[0][..., :head_dim]


class MathEngine:
    """The fuzzer's engine on the CPU. `ours` are the ops while registered."""

    device = "cpu"
    largest_head_dim = 256

    def __init__(self, ours=None, breaks_at: int = -1):
        self.stock, self.ours, self.ops = MathOps(), ours or MathOps(), MathOps()
        self.breaks_at, self.synchronized = breaks_at, 0

    def cannot_run(self, case: Case) -> str:
        return "needs a GPU" if case.fault.endswith(("on_cpu", "on_other_gpu")) else ""

    @contextmanager
    def registered(self, *, strict: bool, speed_rules: bool):
        self.ops = self.ours
        with fa4_ext.register(speed_rules=speed_rules):
            yield
        self.ops = self.stock

    def poison(self, inputs: Inputs) -> None:
        pass

    def explain(self, case: Case, arguments: dict, *, backward: bool) -> bool:
        supported, reason = explain(case, arguments, backward=backward, capability=HOPPER)
        return supported or left_out(reason)

    def synchronize(self) -> None:
        self.synchronized += 1
        if self.synchronized > self.breaks_at >= 0:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_dry_run_finds_nothing():
    """Small cases of every kind run, faults included, with the same math on both sides."""
    small = [
        case
        for case in cases(2, 700)
        if case.problem.heads * sum(case.problem.seqlens_q + case.problem.seqlens_k) < 200
    ]
    report = run_cases(2, small, MathEngine())
    assert not report.failures, report.text()
    assert (
        report.count == len(small) and report.total("ours") > 50 and report.total("rejected") > 20
    ), report.text()
    assert report.total("stock") > 0, report.text()


class Broken(MathOps):
    """Is right but for what a subclass does to the results of the forward or the backward."""

    def flash_forward(self, **arguments):
        return self.forward(arguments, list(super().flash_forward(**arguments)))

    def flash_backward(self, **arguments):
        return self.backward(list(super().flash_backward(**arguments)))

    def forward(self, arguments, results):
        return results

    def backward(self, gradients):
        return gradients


class NoWindow(Broken):
    def flash_forward(self, **arguments):
        return super().flash_forward(**(arguments | {"window_size_left": None}))


class WritesAnInput(Broken):
    def forward(self, arguments, results):
        arguments["key"][-1, 0, 0, 0] += 1
        return results


class OtherStrides(Broken):
    def forward(self, arguments, results):
        return [results[0].transpose(1, 2).contiguous().transpose(1, 2), *results[1:]]


class OtherBits(Broken):
    calls = 0

    def forward(self, arguments, results):
        self.calls += 1
        results[0].mul_(1 + 2**-7 * (self.calls % 2))
        return results


class StockLse(Broken):
    """Returns +inf for a row without keys, as FlashAttention-2 does."""

    def forward(self, arguments, results):
        results[1].masked_fill_(results[1].isneginf(), float("inf"))
        return results


class OneNaN(Broken):
    def forward(self, arguments, results):
        results[0][0, -1, 0, 0] = float("nan")
        return results


class WrongGradient(Broken):
    def backward(self, gradients):
        gradients[1].mul_(1.1)
        return gradients


class OtherGradientBits(Broken):
    calls = 0

    def backward(self, gradients):
        self.calls += 1
        gradients[2].mul_(1 + 2**-7 * (self.calls % 2))
        return gradients


class Raises(Broken):
    def forward(self, arguments, results):
        raise RuntimeError("out of ideas")


BASE = Case(
    "flash",
    dense(40, 70, heads=2, heads_kv=2, head_dim=32, window=(5, 3)),
    backward=True,
    deterministic=True,
)
ROWS_WITHOUT_KEYS = replace(
    BASE, problem=dense(70, 40, heads=2, heads_kv=2, head_dim=32, is_causal=True)
)


@pytest.mark.parametrize(
    ("ops", "case", "message"),
    [
        (NoWindow, BASE, "out: error"),
        (WritesAnInput, BASE, "bytes of an input, or beside it, changed"),
        (OtherStrides, BASE, "out is .* promised is"),
        (OtherBits, BASE, "out: the second run differs"),
        (StockLse, ROWS_WITHOUT_KEYS, "lse: isposinf differs"),
        (OneNaN, BASE, "out: isnan differs at 1 of"),
        (WrongGradient, BASE, "dk: error"),
        (OtherGradientBits, BASE, "dv: the second run differs"),
        (Raises, BASE, "the forward raised RuntimeError: out of ideas"),
        (Raises, replace(BASE, fault="grad_dtype"), "registered, the forward raised .*; not "
            "registered, the backward"),
    ],
)  # fmt: skip
def test_checks_find(ops, case, message):
    report = run_cases(0, [case], MathEngine(ops()))
    [failure] = report.failures
    assert re.search(message, failure.message), failure.message
    assert repr(case) in report.text()


def test_one_failure_does_not_end_the_run_and_like_ones_are_printed_once():
    several = [replace(BASE, seed=seed) for seed in range(3)]
    report = run_cases(0, [*several, ROWS_WITHOUT_KEYS], MathEngine(OneNaN()))
    assert report.total("failed") == 4 and len(report.distinct()) == 1
    assert report.text().count("Case(") == 1 and "4 x out: isnan differs" in report.text()


def test_broken_context_ends_the_run_with_its_case():
    several = [replace(BASE, seed=seed) for seed in range(5)]
    report = run_cases(0, several, MathEngine(breaks_at=2))
    assert report.died and report.count == 3 and report.total("ours") == 2
    assert (
        report.failures[0].case == several[2]
        and "illegal memory access" in report.failures[0].message
    )


def test_json_counts():
    report = run_cases(
        7,
        [BASE, replace(BASE, fault="cum_seq_of_dense", backward=False), varlen_case()],
        MathEngine(),
    )
    told = report.json()
    assert (told["seed"], told["count"], told["ours"], told["rejected"], told["failed"]) == (
        7,
        3,
        2,
        1,
        0,
    )
    assert told["ends"] == {
        "flash dense ours": 1,
        "flash dense rejected": 1,
        "flash varlen ours": 1,
    }
    assert told["features"]["unused rows"] == 1 and told["failures"] == []


def varlen_case() -> Case:
    """Returns a case with everything special that a varlen call can have."""
    problem = varlen(
        (5, 0, 33), (7, 20, 0), heads=4, heads_kv=2, head_dim=64, window=(9, 4), slack=(3, 1)
    )
    return Case("flash", problem, unused_rows=(2, 5), backward=True)
