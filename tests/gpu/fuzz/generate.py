"""Generates random cases. The same seed and index make the same case on every machine; nothing here
needs a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import biases
import torch
from cases import Problem

from fuzz.case import UNALIGNED, Case, runs_on_ours
from fuzz.faults import FAULTS, applicable
from fuzz.tensors import GRADIENTS, LAYOUTS

PRIMES = (
    2,
    3,
    5,
    7,
    11,
    13,
    31,
    61,
    97,
    127,
    131,
    193,
    251,
    257,
    509,
    521,
    769,
    1021,
    1031,
    2039,
    3001,
)
# The tiles of our kernels and of stock's have these numbers of rows of queries or keys.
TILES = (48, 64, 80, 96, 112, 128, 144, 192, 256)
# Limits of a problem's longest sequence, with their weights. Small problems find as much as large
# ones, at many times the rate.
LONGEST = {40: 25, 150: 35, 400: 27, 1000: 11, 3500: 2}
# Elements of all scores together, as many as one head of the longest problem has. The reference
# holds them several times in fp32.
MAX_SCORES = 3500 * 3500


def generate(seed: int, index: int) -> Case:
    rng = random.Random(f"{seed}/{index}")
    op = _pick(rng, {"flash": 55, "sdpa": 15, "functional": 20, "inplace": 10})
    problem = _problem(rng, op)
    backward = op != "inplace" and rng.random() < 0.6
    case = Case(
        op,
        problem,
        seed=rng.getrandbits(32),
        unbounded=_pick(rng, {None: 3, -1: 2, -7: 1}),
        backward=backward,
        deterministic=backward and rng.random() < 0.3,
        speed_rules=rng.random() < 0.2,
        halves=_pick(rng, {"": 6, "ours-stock": 1, "stock-ours": 1})
        if backward and op == "flash"
        else "",
    )
    if rng.random() < 0.15:
        return _with_fault(rng, case)
    return _with_layouts(rng, _with_options(rng, case))


def cases(seed: int, count: int) -> Iterator[Case]:
    return (generate(seed, index) for index in range(count))


def _pick(rng: random.Random, weights: dict):
    return rng.choices(list(weights), list(weights.values()))[0]


def _length(rng: random.Random, longest: int) -> int:
    kind = _pick(rng, {"one": 5, "few": 8, "prime": 20, "edge": 32, "any": 35})
    if kind == "prime":
        return rng.choice([prime for prime in PRIMES if prime <= longest])
    if kind == "edge":
        tile = rng.choice(TILES)
        return min(longest, tile * rng.randint(1, max(1, longest // tile)) + rng.randint(-1, 1))
    return {"one": 1, "few": rng.randint(2, 9), "any": rng.randint(1, longest)}[kind]


def _problem(rng: random.Random, op: str) -> Problem:
    low_level = op in ("flash", "inplace")
    varlen = low_level and rng.random() < 0.5
    longest = _pick(rng, LONGEST)
    heads_kv, ratio = (
        rng.choice((1, 1, 2, 2, 3, 4, 5, 8)),
        _pick(rng, {1: 50, 2: 15, 3: 6, 4: 10, 5: 3, 7: 4, 8: 8, 16: 4}),
    )
    batch = rng.randint(1, 8 if varlen else 4)
    if varlen and rng.random() < 0.05:
        longest, batch = 40, rng.randint(30, 300)
    # This counts pairs of a head and a batch entry.
    fitting = max(1, MAX_SCORES // longest**2)
    heads_kv, ratio = min(heads_kv, fitting), max(1, min(ratio, fitting // heads_kv))
    batch = max(1, min(batch, fitting // (heads_kv * ratio)))
    is_causal = rng.random() < 0.4
    same = rng.random() < 0.5
    if varlen:
        seqlens_q = tuple(0 if rng.random() < 0.1 else _length(rng, longest) for _ in range(batch))
        seqlens_k = (
            seqlens_q
            if same
            else tuple(0 if rng.random() < 0.1 else _length(rng, longest) for _ in range(batch))
        )
    else:
        seqlens_q = (_length(rng, longest),) * batch
        seqlens_k = seqlens_q if same else (_length(rng, longest),) * batch
    empty = rng.random()
    if empty < 0.02:
        seqlens_q = (0,) * batch
    if 0.01 < empty < 0.03:
        seqlens_k = (0,) * batch
    head_dim = _head_dim(rng, op)
    window = (-1, -1)
    if low_level and rng.random() < 0.4:
        window = tuple(_bound(rng, max(seqlens_q), max(seqlens_k)) for _ in range(2))
    slack = (
        tuple(rng.choice((0, 1, 63, 1000)) for _ in range(2))
        if varlen and rng.random() < 0.2
        else (0, 0)
    )
    return Problem(
        dtype=rng.choice((torch.bfloat16, torch.bfloat16, torch.float16)),
        head_dim=head_dim,
        heads=heads_kv * ratio,
        heads_kv=heads_kv,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        varlen=varlen,
        is_causal=is_causal,
        window=window,
        scale=_scale(rng, head_dim),
        slack=slack,
        top_left=op == "functional" and is_causal,
        **_bias(rng, op, is_causal, 0 in seqlens_q + seqlens_k),
    )


def _bias(rng: random.Random, op: str, is_causal: bool, empty: bool) -> dict[str, str]:
    """Draws a kind of bias for some calls that may have one, in its own form or another one."""
    if op != "functional" or is_causal or empty or rng.random() < 0.6:
        return {}
    bias = {"bias": rng.choice(list(biases.KINDS))}
    if rng.random() < 0.5:
        bias["bias_form"] = rng.choice(list(biases.FORMS))
    if rng.random() < 0.5:
        bias["bias_layout"] = rng.choice([*biases.LAYOUTS, biases.EXPANDED])
    return bias


def _head_dim(rng: random.Random, op: str) -> int:
    if op == "functional" and rng.random() < 0.3:
        # F.scaled_dot_product_attention pads it.
        return rng.randint(1, 256)
    return _pick(rng, {64: 22, 128: 28, 96: 5, 192: 5, 256: 5, 8 * rng.randint(1, 32): 35})


def _bound(rng: random.Random, queries: int, keys: int) -> int:
    kind = _pick(
        rng, {"none": 30, "negative": 3, "zero": 12, "few": 15, "any": 25, "all": 10, "more": 5}
    )
    choices = {
        "none": -1,
        "negative": -9,
        "zero": 0,
        "few": rng.randint(1, 8),
        "any": rng.randint(0, max(queries, keys)),
    }
    return (
        choices | {"all": max(0, keys + rng.randint(-1, 1)), "more": rng.choice((5000, 2**31 - 1))}
    )[kind]


def _scale(rng: random.Random, head_dim: int) -> float | None:
    """Draws between 1/20 and 4 times the usual scale, and a few that no kernel computes with."""
    usual = head_dim**-0.5
    return _pick(rng, {None: 66, usual * 2 ** rng.uniform(-4.3, 2): 28, 0.0: 3, -usual: 3})


def _with_options(rng: random.Random, case: Case) -> Case:
    problem = case.problem
    kind = _pick(rng, {"none": 90, "dropout": 5, "seqused_k": 5})
    if kind == "dropout" and case.op != "inplace":
        debug_mask = case.op != "functional" and rng.random() < 0.3
        return replace(case, dropout_p=rng.choice((0.1, 0.5, 0.9)), return_debug_mask=debug_mask)
    if kind == "seqused_k" and case.op in ("flash", "inplace"):
        lengths = tuple(rng.randint(0, length) for length in problem.seqlens_k)
        return replace(case, seqused_k=lengths, backward=False, deterministic=False)
    if case.layout == "varlen" and rng.random() < 0.15:
        return replace(case, unused_rows=(rng.choice((0, 1, 5, 64)), rng.choice((0, 1, 77, 200))))
    return case


def _with_layouts(rng: random.Random, case: Case) -> Case:
    empty = 0 in (sum(case.problem.seqlens_q), sum(case.problem.seqlens_k))
    if empty or rng.random() < 0.4:
        return case

    # Our kernels take the call on every GPU.
    ours = runs_on_ours(case, 128) and not case.speed_rules
    layouts, gradients = (
        [name for name in names[case.layout] if ours or name not in UNALIGNED]
        for names in (LAYOUTS, GRADIENTS)
    )
    if rng.random() < 0.3:
        return replace(case, layouts=(rng.choice(layouts),) * 4)
    # One gradient for all would be that of an unused row.
    gradients = [name for name in gradients if not (any(case.unused_rows) and name == "scalar")]
    return replace(case, layouts=(*rng.choices(layouts, k=3), rng.choice(gradients)))


def _with_fault(rng: random.Random, case: Case) -> Case:
    """Makes a call that is right but for one thing."""
    problem = case.problem
    fault = rng.choice(applicable(case.op, case.layout))
    head_dim = problem.head_dim + -problem.head_dim % 8
    positive = [
        tuple(max(length, 1) for length in seqlens)
        for seqlens in (problem.seqlens_q, problem.seqlens_k)
    ]
    same = positive[0] if case.op == "functional" else positive[1]
    problem = replace(
        problem, head_dim=head_dim, seqlens_q=positive[0], seqlens_k=same, scale=None, slack=(0, 0),
        bias=None, bias_form="", bias_layout="contiguous",
    )  # fmt: skip
    backward = FAULTS[fault].backward
    case = replace(case, problem=problem, fault=fault, speed_rules=False)
    return replace(case, backward=backward, deterministic=backward and case.deterministic)
