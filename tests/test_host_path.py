"""Checks what a call allocates and launches, on a machine without a GPU: the overrides run on
tensors of the CPU, behind a CUDA driver that notes launches and does nothing."""

from __future__ import annotations

import math
from functools import partial

import fake_device
import pytest

HEADS = {"mha": (4, 4), "gqa": (4, 2)}


@pytest.fixture
def calls(driver):
    """Returns what calls.py prints."""
    return partial(fake_device.reported, driver, "calls.py")


def layout(tensor: dict) -> tuple:
    return tuple(tensor["shape"]), tuple(tensor["stride"]), tensor["dtype"]


def memory(tensors: list[dict]) -> dict[int, int]:
    """Returns address and size of each allocation."""
    return {tensor["memory"]: tensor["memory_bytes"] for tensor in tensors}


def check_forward(found: dict, out: tuple, lse: tuple) -> None:
    """Asserts one launch, and nothing allocated but the results: each in memory of its own, of its
    own size."""
    assert len(found["launches"]) == 1, found["launches"]
    tensors = found["tensors"]
    assert [layout(t) for t in tensors] == [
        (*out, "torch.bfloat16"), (*lse, "torch.float32"),
        ((2,), (1,), "torch.uint64"), ((), (), "torch.uint64"), ((0,), (1,), "torch.bfloat16"),
    ]  # fmt: skip
    assert (
        memory(tensors) == {t["begin"]: t["end"] - t["begin"] for t in tensors}
        and len(memory(tensors)) == 5
    ), tensors
    assert found["allocations"] == len(tensors), found["allocations"]
    assert found["cleared_at"] in (0, tensors[3]["begin"]), (
        "the counter of tiles lies in the number that nobody reads"
    )


@pytest.mark.parametrize("heads", HEADS)
def test_a_dense_call(calls, heads):
    query, key = HEADS[heads]
    forward, backward = calls("sdpa", query, key)
    strides = {h: ((2, h, 129, 128), (129 * h * 128, 128, h * 128, 1)) for h in (query, key)}
    check_forward(forward, strides[query], ((2, query, 129), (query * 129, 129, 1)))
    assert [layout(t)[:2] for t in backward["tensors"]] == [
        strides[query],
        strides[key],
        strides[key],
    ]
    check_backward(backward, sums_groups=heads == "gqa")


@pytest.mark.parametrize("heads", HEADS)
def test_a_varlen_call(calls, heads):
    query, key = HEADS[heads]
    forward, backward = calls("varlen", query, key)
    check_forward(forward, ((229, query, 128), (query * 128, 128, 1)), ((query, 229), (229, 1)))
    assert [tuple(t["shape"]) for t in backward["tensors"]] == [
        (229, query, 128),
        (229, key, 128),
        (229, key, 128),
    ]
    # The kernel of groups, which runs short packed sequences, needs no accumulators of dK and dV.
    check_backward(backward, sums_groups=False)


@pytest.mark.parametrize(("columns", "op"), ((2, "forward"), (200, "decode")))
@pytest.mark.parametrize("heads_kv", (1, 2, 4))
def test_a_call_with_keys_in_pages(calls, heads_kv, columns, op):
    forward, inplace = calls("paged", 4, heads_kv, columns)
    check_forward(forward, ((2, 4, 128), (512, 128, 1)), ((4, 2), (2, 1)))
    assert [layout(t)[:2] for t in inplace["tensors"]] == [((4, 2), (2, 1))]
    assert (
        all(op in name for name in forward["launches"] + inplace["launches"])
        and len(inplace["launches"]) == 1
    )


@pytest.mark.parametrize("heads", HEADS)
def test_this_library_s_own_op_without_a_registration(calls, heads):
    """The results are those of a dense call but for the numbers that PyTorch's ops return besides.
    A step of decoding reads the cache where it lies."""
    query, key = HEADS[heads]
    forward, backward, decode = calls("own", query, key)
    shapes = {h: ((2, 129, h, 128), (129 * h * 128, h * 128, 128, 1)) for h in (query, key)}
    assert [layout(t) for t in forward["tensors"]] == [
        (*shapes[query], "torch.bfloat16"),
        ((2, query, 129), (query * 129, 129, 1), "torch.float32"),
    ]
    assert len(forward["launches"]) == 1 and forward["allocations"] == 3, forward
    assert [layout(t)[:2] for t in backward["tensors"]] == [
        shapes[query], shapes[key], shapes[key],
    ]  # fmt: skip
    check_backward(backward, sums_groups=heads == "gqa")
    (launched,) = decode["launches"]
    assert "decode" in launched and decode["allocations"] == 3, decode


def check_backward(found: dict, *, sums_groups: bool) -> None:
    """Asserts that each gradient has memory of its own. With accumulators of dK and dV, these are
    cleared before and converted after."""
    steps = ["reprocess", "ackward", "ostprocess"] + ["ostprocess"] * 2 * sums_groups
    assert all(step in name for step, name in zip(steps, found["launches"], strict=True)), found[
        "launches"
    ]
    assert (found["cleared_bytes"] > 0) == sums_groups, found["cleared_bytes"]
    assert memory(found["tensors"]) == {
        t["begin"]: 2 * math.prod(t["shape"]) for t in found["tensors"]
    }, found["tensors"]


def test_an_output_that_is_given_is_written_in_place(calls):
    (found,) = calls("inplace", 4, 2)
    (lse,) = found["tensors"]
    assert (
        layout(lse) == ((2, 4, 129), (516, 129, 1), "torch.float32")
        and lse["memory_bytes"] == 4 * 2 * 4 * 129
    )
    assert found["allocations"] == 1, found["allocations"]
    assert len(found["launches"]) == 1, found["launches"]


def test_an_output_that_is_written_by_way_of_a_copy(calls):
    """Rows that no sequence has keep what the caller had there; without keys all are zero."""
    packed, without_keys = calls("inplace_by_a_copy")
    assert packed == [7.0, 7.0], "the copy held other numbers where no kernel writes"
    assert without_keys == [0.0, 0.0], without_keys


@pytest.mark.parametrize("keys", (129, 203))
@pytest.mark.parametrize("heads", HEADS)
def test_a_call_of_the_cudnn_op(calls, heads, keys):
    """With more keys than queries the mask is aligned top-left: the kernels get as many keys as
    there are queries."""
    query, key = HEADS[heads]
    forward, backward = calls("cudnn", query, key, 129, keys)
    assert len(forward["launches"]) == 1, forward["launches"]
    tensors = forward["tensors"]
    assert [layout(t) for t in tensors] == [
        ((2, query, 129, 128), (129 * query * 128, 128, query * 128, 1), "torch.bfloat16"),
        ((2, query, 129, 1), (query * 129, 129, 1, 1), "torch.float32"),
        ((), (), "torch.int64"), ((), (), "torch.int64"),
    ]  # fmt: skip
    assert len(memory(tensors)) == 4, tensors
    strides = {
        rows: {h: ((2, h, rows, 128), (rows * h * 128, 128, h * 128, 1)) for h in (query, key)}
        for rows in (129, keys)
    }
    assert [layout(t)[:2] for t in backward["tensors"]] == [
        strides[129][query], strides[keys][key], strides[keys][key],
    ]  # fmt: skip
    check_backward(backward, sums_groups=heads == "gqa")


CUDNN_OP = "_scaled_dot_product_cudnn_attention"
UNSUPPORTED = f"FA4 {CUDNN_OP} unsupported"
NO_CUDNN = "this build of torch has no CUDA kernel for it"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (("backend",), f"{CUDNN_OP}: {NO_CUDNN}"),
        (("order",), f"{CUDNN_OP}: {NO_CUDNN}"),
        (("prefer",), f"{CUDNN_OP}: {NO_CUDNN}"),
        (("seed",), f"{CUDNN_OP}_backward: {NO_CUDNN}"),
        (("flash", "first"), "ran"),
        (("causal", "bias"), f"{UNSUPPORTED}: attn_bias with is_causal not supported"),
        (("bias", "of", "3", "dimensions"), f"{UNSUPPORTED}: attn_bias must be 2D or 4D, is 3D"),
        (
            ("bias", "of", "fewer", "keys"),
            f"{UNSUPPORTED}: attn_bias must have 1 or 129 indices in dimension -1, has 128",
        ),
        (
            ("bias", "of", "fp32"),
            f"{UNSUPPORTED}: attn_bias must have query's dtype, which a bool attn_mask gets first",
        ),
        (
            ("bias", "with", "a", "gradient"),
            f"{UNSUPPORTED}: attn_bias must not require a gradient",
        ),
    ],
)
def test_whoever_chooses_cudnn_gets_it(calls, chosen, expected):
    assert calls("refused_by_cudnn_op", *chosen) == [expected]


@pytest.mark.parametrize(
    ("kind", "copied"),
    [
        ("whole", False), ("of_heads", False), ("of_queries", False), ("of_keys", False),
        ("expanded", False), ("odd_rows", True), ("odd_address", True), ("of_one_key", True),
        ("of_one_key_expanded", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("heads", HEADS)
def test_a_masked_call_of_the_cudnn_op(calls, heads, kind, copied):
    """Both halves map the bias first, and copy one that they cannot read in pairs."""
    query, key = HEADS[heads]
    forward, backward = calls("masked", query, key, kind)
    assert_launched(forward, "map_queries", "forward")
    assert_launched(backward, "map_queries", "map_keys", "backward_queries", "backward_keys")
    assert forward["cleared_bytes"] == backward["cleared_bytes"] == 0
    # Beside the results there is the workspace.
    assert forward["allocations"] == len(memory(forward["tensors"])) + 1 + copied
    assert backward["allocations"] == 3 + 1 + copied


@pytest.mark.parametrize("kind", ["none", "whole", "of_heads", "of_queries", "of_keys"])
def test_a_call_of_the_memory_efficient_op(calls, kind):
    """Its results have the heads of a row side by side, whatever the inputs have, and rows of the
    logsumexp in multiples of 32."""
    forward, backward, inference = calls("efficient", kind)
    maps = () if kind == "none" else ("map_queries",)
    assert_launched(forward, *maps, "forward")
    assert_launched(inference, *maps, "forward")
    out = (2, 4, 129, 128), (129 * 4 * 128, 128, 4 * 128, 1), "torch.bfloat16"
    numbers = 2 * [((), (), "torch.int64")]
    lse = {rows: ((2, 4, rows), (4 * max(rows, 1), max(rows, 1), 1)) for rows in (160, 0)}
    for found, rows in ((forward, 160), (inference, 0)):
        assert [layout(t) for t in found["tensors"]] == [
            out, (*lse[rows], "torch.float32"), *numbers,
        ]  # fmt: skip
        assert len(memory(found["tensors"])) == 4
    of_keys = (2, 4, 202, 128), (202 * 4 * 128, 128, 4 * 128, 1), "torch.bfloat16"
    assert [layout(t) for t in backward["tensors"]] == [out, of_keys, of_keys]
    if maps:
        steps = "map_queries", "map_keys", "backward_queries", "backward_keys"
        assert_launched(backward, *steps)


EFFICIENT_OP = "_scaled_dot_product_efficient_attention"
NOT_EFFICIENT = f"FA4 {EFFICIENT_OP} unsupported"
NO_EFFICIENT = f"{EFFICIENT_OP}: {NO_CUDNN}"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("backend", NO_EFFICIENT),
        ("order", NO_EFFICIENT),
        ("prefer", NO_EFFICIENT),
        ("fp32", NO_EFFICIENT),
        ("flash first", "ran"),
        ("dropout", f"{NOT_EFFICIENT}: dropout_p must be 0"),
        ("bias with a gradient", "ran"),
        (
            "gradient of bias",
            f"FA4 {EFFICIENT_OP}_backward unsupported: no kernel computes the gradient of "
            "attn_bias",
        ),
    ],
)
def test_what_memory_efficient_attention_keeps(calls, chosen, expected):
    assert calls("refused_by_efficient_op", *chosen.split()) == [expected]


def assert_launched(found: dict, *steps: str) -> None:
    launches = found["launches"]
    assert len(launches) == len(steps), launches
    assert all(step in name for step, name in zip(steps, launches, strict=True)), launches
