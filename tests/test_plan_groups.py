"""Which backwards of GQA the planner gives to the kernel whose CTAs work on all query heads of
their keys: those that were measured to be faster on it."""

from __future__ import annotations

import fa4_core
import pytest

from scripts.core_problem import core_problem

GROUPS = "sm90_backward_groups_bf16_{}_{}_{}_m64n128"
# 512 causal key blocks, for 132 SMs
LLAMA = {
    "op": "backward", "dtype": "bf16", "layout": "dense", "capability": 90, "peer": "cudnn",
    "batch": 8, "seqlen_q": 1024, "seqlen_k": 1024, "total_q": 8192, "total_k": 8192,
    "num_heads": 32, "num_heads_kv": 8, "head_dim": 128, "head_dim_v": 128, "is_causal": True,
    "window_size_left": -1, "window_size_right": -1, "deterministic": False,
}  # fmt: skip


def tokens(length: int, batch: int = 8) -> dict:
    rows = {"total_q": batch * length, "total_k": batch * length}
    return {"batch": batch, "seqlen_q": length, "seqlen_k": length, **rows}


PACKED = {"layout": "varlen", "peer": "flash"}


def chosen(change: dict, *disabled: str, speed_rules: bool = False):
    return fa4_core.plan(
        core_problem(LLAMA | change), speed_rules, disabled=fa4_core.KernelSet(list(disabled))
    )


@pytest.mark.parametrize(
    ("change", "head_dims", "mask"),
    [
        ({}, "d128", "causal"),
        (tokens(4096), "d128", "causal"),
        ({"head_dim": 104, "head_dim_v": 72}, "d128", "causal"),
        ({"is_causal": False}, "d128", "full"),
        ({"is_causal": False, **tokens(1024, batch=2)}, "d128", "full"),
        ({"num_heads": 64, "head_dim": 64, "head_dim_v": 64}, "d64", "causal"),
        ({"peer": "flash"}, "d128", "causal"),
        (PACKED, "d128", "causal"),
        (PACKED | {"is_causal": False}, "d128", "full"),
        (PACKED | {"head_dim": 64, "head_dim_v": 64}, "d64", "causal"),
        (PACKED | {"num_heads": 64} | tokens(256, batch=64), "d128", "causal"),
    ],
    ids=[
        "llama",
        "4k",
        "smaller_head_dims",
        "full",
        "two_sequences",
        "d64",
        "flash",
        "packed",
        "packed_full",
        "packed_d64",
        "short",
    ],
)
@pytest.mark.parametrize("speed_rules", (False, True))
def test_groups_run_together_where_that_was_measured_to_be_faster(
    change, head_dims, mask, speed_rules
):
    plan = chosen(change, speed_rules=speed_rules)
    layout = change.get("layout", "dense")
    assert plan.supported and plan.kernel.name == GROUPS.format(head_dims, layout, mask), (
        plan.reason or plan.kernel.name
    )


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads_kv": 32},
        {"deterministic": True},
        PACKED | {"num_heads": 64},
        PACKED | tokens(4096),
        PACKED | {"is_causal": False} | tokens(2048),
        PACKED | {"seqlen_q": 2049, "seqlen_k": 2049},  # one of them
        PACKED | tokens(15, batch=512),
        {"window_size_left": 100},
        {"head_dim": 96, "head_dim_v": 96},
        {"head_dim": 192, "head_dim_v": 128},
        {"num_heads": 64},  # causal, eight heads of 128
        {"is_causal": False, **tokens(2048)},
        {"is_causal": False, **tokens(1024, batch=1)},  # 64 CTAs
        {"is_causal": False, "head_dim": 64, "head_dim_v": 64},
        {"head_dim": 64, "head_dim_v": 64, **tokens(2048)},
        tokens(8192),
        tokens(127, batch=64),
        tokens(2048, batch=2),  # one wave: its first CTAs would work twice as long as the average
        {"capability": 100},
    ],
    ids=str,
)
def test_the_other_kernel_runs_what_was_not(change):
    plan = chosen(change)
    assert plan.supported and "groups" not in plan.kernel.name, plan.reason or plan.kernel.name


def test_groups_run_together_where_the_other_kernels_are_disabled():
    plan = chosen(tokens(100), "sm90_backward_*_gqa_*", "sm90_backward_keys_*")
    assert plan.kernel.name == GROUPS.format("d128", "dense", "causal")
    assert "groups" not in chosen({}, "sm90_backward_groups_*").kernel.name


@pytest.mark.parametrize(
    ("change", "heads"),
    [
        (tokens(1024), 16),  # 8 blocks a head: 128 blocks of 132 SMs
        (tokens(4096), 8),  # 32: two waves
        ({"is_causal": False}, 1),
        (PACKED, 1),
    ],
    ids=["one_wave", "two_waves", "full", "packed"],
)
def test_heads_whose_causal_blocks_fill_the_sms_are_worked_on_together(change, heads):
    assert chosen(change).heads_together == heads


def test_dk_and_dv_of_groups_need_no_accumulators():
    together, apart = chosen({}), chosen({}, "sm90_backward_groups_*")
    accumulators = 2 * 4 * 8 * 1024 * 8 * 128  # fp32 of dK and dV
    assert apart.workspace.bytes - together.workspace.bytes == accumulators
