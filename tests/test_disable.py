"""Plans where kernels are disabled: none of them runs, another one does what it can of their calls,
and forward and backward of a call still compute the same function."""

from __future__ import annotations

import fa4_core
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_problems import biased_problems, problems

from scripts.core_problem import core_problem

ROWS = fa4_core.kernels()
NAMES = [row.name for row in ROWS]
LEGAL = {
    "op": "forward", "dtype": "bf16", "layout": "dense", "capability": 90, "batch": 2,
    "seqlen_q": 512, "seqlen_k": 512, "total_q": 1024, "total_k": 1024, "num_heads": 8,
    "num_heads_kv": 8, "head_dim": 128, "head_dim_v": 128, "is_causal": False,
    "window_size_left": -1, "window_size_right": -1, "deterministic": False,
}  # fmt: skip
DECODE = {"seqlen_q": 1, "total_q": 2, "seqlen_k": 8192, "total_k": 16384}
PACKED = {"layout": "varlen"}
BIAS = {"bias": (1, 8)}
# The stock kernel takes the number of keys for a right bound here.
DISAGREES = PACKED | {"seqlen_q": 600, "total_q": 1200, "window_size_left": 100}


def plan(change: dict, *patterns: str, speed_rules: bool = False, tile_rules: list | None = None):
    return fa4_core.plan(
        core_problem(LEGAL | change),
        speed_rules,
        tile_rules=[] if tile_rules is None else tile_rules,
        disabled=fa4_core.KernelSet(list(patterns)),
    )


def name(change: dict, *patterns: str, **options) -> str:
    chosen = plan(change, *patterns, **options)
    return chosen.kernel.name if chosen.kernel else chosen.reason


def needed(kernel) -> set[str]:
    """Returns the kernel's name and those of the kernels that it is launched with."""
    rows = (
        *(kernel.preprocess, kernel.postprocess_dq, kernel.postprocess_dk, kernel.postprocess_dv),
        *(kernel.map_queries, kernel.map_keys),
    )
    return {kernel.name, *(NAMES[row] for row in rows if row >= 0)}


def disabled(kernel: str) -> str:
    return f"kernel {kernel} is disabled (FA4_EXT_DISABLE or register(disable=...))"


@pytest.mark.parametrize(
    ("change", "patterns", "expected"),
    [
        ({}, (), "sm90_forward_bf16_d128_dense_full_m128n128"),
        ({}, ("sm90_forward_bf16_d64_*",), "sm90_forward_bf16_d128_dense_full_m128n128"),
        (
            {},
            ("sm90_forward_bf16_d128_dense_full_m128n128",),
            "sm90_forward_bf16_d128_dense_full_m64n64",
        ),
        (
            {},
            ("sm90_forward_bf16_d128_dense_full_m128n128", "*_d128_dense_full_m64n64"),
            "sm90_forward_bf16_d128_dense_full_m64n128",
        ),
        ({}, ("sm90_forward_bf16_d128_*",), "sm90_forward_bf16_d192v128_dense_full_m128n128"),
        ({}, ("sm90_forward_bf16_d1[29]*",), "sm90_forward_bf16_d256_dense_full_m128n64"),
        (
            {"op": "backward"},
            ("sm90_backward_bf16_d128_dense_full_mha_m8?n128",),
            "sm90_backward_bf16_d128_dense_full_mha_m64n128",
        ),
        (DECODE, (), "sm90_decode_bf16_d128_any_m16n64"),
        (DECODE, ("*_decode_*_m16*",), "sm90_decode_bf16_d128_any_m64n64"),
        (DECODE, ("sm90_decode_bf16_d128_*",), "sm90_decode_bf16_d192v128_any_m16n64"),
        (DECODE, ("sm90_decode_*",), "sm90_forward_bf16_d128_dense_full_m64n64"),
        (DECODE, ("sm90_forward_*",), "sm90_decode_bf16_d128_any_m16n64"),
        (
            {"op": "backward", "capability": 100, "head_dim": 64, "head_dim_v": 64} | PACKED,
            ("sm100_backward_bf16_*_mha_*",),
            "sm100_backward_bf16_d64_varlen_full_gqa_m128n128",
        ),
    ],
)
def test_another_kernel_runs_what_a_disabled_one_would(change, patterns, expected):
    assert name(change, *patterns) == expected


@pytest.mark.parametrize(
    ("change", "patterns", "wanted"),
    [
        (
            {"seqlen_q": 513, "total_q": 1026},  # more than a decode kernel takes
            ("sm90_forward_*",),
            "sm90_forward_bf16_d128_dense_full_m128n128",
        ),
        ({}, ("sm90_*",), "sm90_forward_bf16_d128_dense_full_m128n128"),
        (
            {"op": "backward"},
            ("sm90_backward_*",),
            "sm90_backward_bf16_d128_dense_full_mha_m80n128",
        ),
        (
            {"page_size": 64} | PACKED | DECODE,
            ("*_decode_*", "*_paged_*"),
            "sm90_decode_bf16_d128_any_m16n64",
        ),
        ({"num_splits": 4} | DECODE, ("*_decode_*",), "sm90_decode_bf16_d128_any_m16n64"),
        (
            {"op": "backward", "head_dim": 256, "head_dim_v": 256},
            ("sm90_backward_queries_*",),
            "sm90_backward_queries_bf16_d256_dense_full_m128n64",
        ),
        (BIAS, ("*_map_queries_*_m128n*",), "sm90_map_queries_bf16_m128n128"),
        (BIAS, ("*_bias_*",), "sm90_forward_bf16_d128_dense_bias_m128n128"),
        ({"op": "backward"} | BIAS, ("*_map_queries_*",), "sm90_map_queries_bf16_m128n64"),
        ({"op": "backward"} | BIAS, ("*_map_keys_*",), "sm90_map_keys_bf16_m64n64"),
        (
            {"capability": 103, "op": "backward"},
            ("sm100_backward_*",),
            "sm100_backward_bf16_d128_dense_full_mha_m128n128_2cta",
        ),
    ],
)
def test_where_no_other_kernel_can_the_reason_names_the_disabled_one(change, patterns, wanted):
    chosen = plan(change, *patterns, speed_rules=True)
    assert not chosen.supported and not chosen.stock_is_faster
    assert chosen.reason == disabled(wanted)


@pytest.mark.parametrize("change", [{}, PACKED, {"num_heads_kv": 2}, {"capability": 100}])
def test_a_backward_needs_every_kernel_that_it_is_launched_with(change):
    problem = {"op": "backward"} | change
    for companion in needed(plan(problem).kernel):
        chosen = plan(problem, companion)
        assert chosen.supported and companion not in needed(chosen.kernel), companion
        arch = companion.split("_")[0]
        alone = plan(problem, f"{arch}_backward_*_d[2-9]*", f"{arch}_backward_*_d1[39]*", companion)
        if alone.kernel:
            assert companion not in needed(alone.kernel), companion
        else:
            assert alone.reason == disabled(companion)


def test_forward_runs_without_a_backward_where_pytorch_s_computes_its_derivative():
    assert name({}, "sm90_backward_*") == name({})
    assert name(BIAS, "sm90_backward_*") == name(BIAS)
    assert name(BIAS | {"op": "backward"}, "sm90_forward_*") == name(BIAS | {"op": "backward"})
    assert name({"window_size_left": 100}, "sm90_postprocess_*") == name({"window_size_left": 100})


BOTH = ", and forward and backward of this call must both run on these kernels"
BACKWARD = "sm90_backward_bf16_d128_varlen_window_mha"
TWO_PASSES = "sm90_backward_keys_*"  # the kernels that would run in its place


@pytest.mark.parametrize(
    ("op", "patterns", "lacking"),
    [
        ("forward", ("sm90_backward_*",), f"{BACKWARD}_m64n128"),
        # Whether the backward will have to be deterministic is not known yet.
        (
            "forward",
            ("sm90_backward_*_deterministic_*", TWO_PASSES),
            f"{BACKWARD}_deterministic_m64n128",
        ),
        ("forward", ("sm90_preprocess_*", TWO_PASSES), "sm90_preprocess_bf16_d128_varlen_m64"),
        (
            "backward",
            ("sm90_forward_*", "sm90_decode_*"),
            "sm90_forward_bf16_d128_varlen_window_m128n128",
        ),
    ],
)
def test_neither_half_runs_alone_where_pytorch_computes_another_function(op, patterns, lacking):
    assert plan(DISAGREES | {"op": op}).supported
    chosen = plan(DISAGREES | {"op": op}, *patterns)
    assert not chosen.supported and chosen.reason == disabled(lacking) + BOTH


def test_no_speed_rule_chooses_a_backward_whose_rows_no_kernel_clears():
    problem = {
        "op": "backward",
        "seqlen_q": 8,
        "seqlen_k": 8,
        "total_q": 512,
        "total_k": 512,
        "batch": 64,
        "num_heads_kv": 2,
    } | PACKED
    assert plan(problem, speed_rules=True).stock_is_faster
    for patterns in (("sm90_clear_bf16_*",), ("sm90_clear_*", "sm90_backward_fp16_*")):
        assert name(problem, *patterns, speed_rules=True) == name(problem), patterns
    assert plan(problem, "sm90_clear_fp16_*", speed_rules=True).stock_is_faster
    chosen = plan(problem, "sm90_clear_*", "sm90_backward_*", speed_rules=True)
    assert not chosen.stock_is_faster and "is disabled" in chosen.reason


def test_a_disabled_tile_is_not_what_a_tile_rule_chooses():
    any_size = (0, 2**31 - 1)
    rule = fa4_core.TileRule(
        fa4_core.Op.FORWARD, fa4_core.Layout.DENSE, 128, fa4_core.Mask.FULL,
        any_size, any_size, any_size, fa4_core.Tile(64, 128), False,
    )  # fmt: skip
    tuned, default = (
        f"sm90_forward_bf16_d128_dense_full_{tile}" for tile in ("m64n128", "m128n128")
    )
    assert name({}, tile_rules=[rule]) == tuned
    assert name({}, tuned, tile_rules=[rule]) == default


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="no kernel matches sm80_"):
        fa4_core.KernelSet(["sm90_*", "sm80_*"])


PATTERNS = st.lists(
    st.one_of(
        st.sampled_from(NAMES),
        st.sampled_from(
            [
                "sm90_forward_*", "*_d128_*", "*_gqa_*", "*_deterministic_*", "sm90_decode_*",
                "sm100_forward_*", "*_preprocess_*", "sm90_backward_*", "*_clear_*", "*_window_*",
                "*_bias_*", "*_map_queries_*", "*_map_keys_*",
            ]
        ),
    ),
    max_size=6,
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.one_of(problems(), biased_problems()), PATTERNS, st.booleans())
def test_no_disabled_kernel_runs_and_the_reason_is_one(problem, patterns, speed_rules):
    """A speed rule may hold for the kernel that is left."""
    left_out = fa4_core.KernelSet(patterns)
    chosen, free = (
        fa4_core.plan(core_problem(problem), speed_rules, disabled=kernels)
        for kernels in (left_out, fa4_core.KernelSet([]))
    )
    out = {name for pattern in patterns for name in matching(pattern)}
    if chosen.kernel:
        assert not needed(chosen.kernel) & out, (chosen.kernel.name, patterns)
    elif chosen.stock_is_faster and not free.stock_is_faster:
        assert speed_rules and needed(free.kernel) & out, (free.kernel.name, patterns)
    elif not chosen.supported and chosen.reason != free.reason:
        assert any(chosen.reason.startswith(disabled(kernel)) for kernel in out), chosen.reason
    if free.kernel and not needed(free.kernel) & out and chosen.kernel:
        assert chosen.kernel.name == free.kernel.name


def matching(pattern: str) -> list[str]:
    from fnmatch import fnmatchcase

    return [kernel for kernel in NAMES if fnmatchcase(kernel, pattern)]
