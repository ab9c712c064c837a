"""Checks the aten ops as this torch declares them, and that each argument is at the place where
csrc/aten takes it off the stack."""

from __future__ import annotations

import re

import pytest
import torch
from this_torch import VERSION
from torch._subclasses.fake_tensor import FakeTensorMode

import fa4_ext

# CPU tensors and fake ones would never get there on their own.
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
BLOCK_TABLE = VERSION >= (2, 12)
# It exists in torch 2.12 and later.
INPLACE = "_flash_attention_forward_no_dropout_inplace"

QKV = "Tensor query, Tensor key, Tensor value, "
CUM_SEQ = "cum_seq_q, Tensor{0} cum_seq_k, int max_q, int max_k, float dropout_p, bool is_causal, "
WINDOW = "float? scale, int? window_size_left, int? window_size_right"
GRADIENT = "Tensor grad_out, " + QKV + "Tensor out, Tensor logsumexp, Tensor " + CUM_SEQ.format("")
FORWARD = (
    QKV
    + "Tensor? "
    + CUM_SEQ.format("?")
    + "bool return_debug_mask, "
    + WINDOW
    + ", Tensor? seqused_k, Tensor? alibi_slopes"
)
FORWARD_2_12 = FORWARD + ", Tensor? block_table, int? num_splits"
CUDNN_GRADIENT = (
    "Tensor grad_out, "
    + QKV
    + "Tensor out, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, Tensor attn_bias, "
    "Tensor cum_seq_q, Tensor cum_seq_k, int max_q, int max_k, float dropout_p, bool is_causal, "
    "float? scale"
)
CUDNN_FORWARD = (
    QKV + "Tensor? attn_bias, Tensor? cum_seq_q, Tensor? cum_seq_k, int max_q, int max_k, "
    "bool compute_log_sumexp, float dropout_p, bool is_causal, bool return_debug_mask, float? scale"
)
CUDNN_FORWARD_2_14 = CUDNN_FORWARD + ", Tensor? seqused_k, Tensor? block_table"
CUDNN_INPLACE = "_cudnn_attention_forward_no_dropout_inplace"
EFFICIENT = "_scaled_dot_product_efficient_attention"
EFFICIENT_BACKWARD = EFFICIENT + "_backward"
TENSORS = ["Tensor"]
ARGUMENTS_AND_RESULTS = {
    "_scaled_dot_product_flash_attention": (
        QKV + "float dropout_p, bool is_causal, bool return_debug_mask, float? scale",
        4 * TENSORS + ["int", "int"] + 3 * TENSORS,
    ),
    "_scaled_dot_product_flash_attention_backward": (
        GRADIENT + "Tensor philox_seed, Tensor philox_offset, float? scale", 3 * TENSORS,
    ),
    "_flash_attention_forward": (FORWARD_2_12 if BLOCK_TABLE else FORWARD, 5 * TENSORS),
    "_flash_attention_backward": (
        GRADIENT + "Tensor rng_state, Tensor unused, " + WINDOW, 3 * TENSORS,
    ),
    "_scaled_dot_product_cudnn_attention": (
        QKV + "Tensor? attn_bias, bool compute_log_sumexp, float dropout_p, bool is_causal, "
        "bool return_debug_mask, float? scale",
        4 * TENSORS + ["int", "int"] + 3 * TENSORS,
    ),
    "_scaled_dot_product_cudnn_attention_backward": (CUDNN_GRADIENT, 3 * TENSORS),
    "_cudnn_attention_forward": (
        CUDNN_FORWARD_2_14 if VERSION >= (2, 14) else CUDNN_FORWARD,
        4 * TENSORS + ["int", "int"] + 3 * TENSORS,
    ),
    "_cudnn_attention_backward": (CUDNN_GRADIENT, 3 * TENSORS),
    EFFICIENT: (
        QKV + "Tensor? attn_bias, bool compute_log_sumexp, float dropout_p, bool is_causal, "
        "float? scale",
        4 * TENSORS,
    ),
    EFFICIENT_BACKWARD: (
        "Tensor grad_out_, " + QKV + "Tensor attn_bias, Tensor out, Tensor logsumexp, "
        "Tensor philox_seed, Tensor philox_offset, float dropout_p, bool[4] grad_input_mask, "
        "bool is_causal, float? scale",
        4 * TENSORS,
    ),
}  # fmt: skip
if BLOCK_TABLE:
    ARGUMENTS_AND_RESULTS[INPLACE] = "Tensor(a!) out, " + FORWARD_2_12, TENSORS
if VERSION >= (2, 15):
    ARGUMENTS_AND_RESULTS[CUDNN_INPLACE] = (
        "Tensor(a!) out, " + QKV + "Tensor cum_seq_q, Tensor? cum_seq_k, int max_q, int max_k, "
        "bool is_causal, float? scale, Tensor? seqused_k, Tensor? block_table",
        TENSORS,
    )


def overload(op: str):
    return getattr(torch.ops.aten, op).default


def arguments(schema) -> str:
    """Returns the arguments in order and without what does not change their number or type:
    defaults, the star, and that an int may be symbolic."""
    text = str(schema).partition("(")[2].rpartition(") -> ")[0]
    return re.sub(r"=[^,]*|\*, ", "", text).replace("SymInt", "int")


@pytest.mark.parametrize("op", ARGUMENTS_AND_RESULTS)
def test_schema_is_the_one_that_the_override_reads(op):
    schema = overload(op)._schema
    assert (
        arguments(schema),
        [str(result.type) for result in schema.returns],
    ) == ARGUMENTS_AND_RESULTS[op]


def test_explain_reads_what_the_forward_op_has():
    assert arguments(torch.ops.fa4_ext.explain.default._schema).startswith(FORWARD_2_12 + ", ")


def test_inplace_op_is_there_from_torch_2_12_on():
    assert hasattr(torch.ops.aten, INPLACE) == BLOCK_TABLE


def qkv(device: str, **change) -> dict:
    make = {"size": (2, 16, 8, 64), "dtype": torch.bfloat16, "device": device}
    with FakeTensorMode():  # a CUDA tensor without a GPU
        return {
            name: torch.empty(**(make | change.get(name, {}))) for name in ("query", "key", "value")
        }


PLAIN = {"dropout_p": 0.0, "is_causal": False}
LENGTHS = {"cum_seq_q": None, "cum_seq_k": None, "max_q": 16, "max_k": 16}
ONE = torch.ones(1, dtype=torch.int32)
ROWS = torch.zeros(2, 8, 16)
# The override runs the backward of our own forward alone, whose seed begins behind its memory's
# first two numbers.
OUR_SEED = torch.zeros(3, dtype=torch.int64)[2]
CUDNN = PLAIN | {"attn_bias": None, "compute_log_sumexp": True}
# This op takes packed tensors alone.
PACKED = LENGTHS | {"cum_seq_q": ONE, "cum_seq_k": ONE}
CUDNN_GRADIENTS = {
    "dropout_p": 0.0, "is_causal": False, "attn_bias": None,
    "philox_seed": OUR_SEED, "philox_offset": ONE,
}  # fmt: skip
OTHERS = {
    "_scaled_dot_product_flash_attention": PLAIN,
    "_scaled_dot_product_flash_attention_backward": PLAIN
    | LENGTHS
    | {"philox_seed": ONE, "philox_offset": ONE},
    "_flash_attention_forward": PLAIN | LENGTHS | {"return_debug_mask": False},
    "_flash_attention_backward": PLAIN | LENGTHS | {"rng_state": ONE, "unused": ONE},
    INPLACE: PLAIN | LENGTHS | {"return_debug_mask": False},
    "_scaled_dot_product_cudnn_attention": CUDNN,
    "_scaled_dot_product_cudnn_attention_backward": CUDNN_GRADIENTS | LENGTHS,
    "_cudnn_attention_forward": CUDNN | LENGTHS,
    "_cudnn_attention_backward": CUDNN_GRADIENTS | LENGTHS,
    CUDNN_INPLACE: PACKED | {"is_causal": False},
    EFFICIENT: CUDNN | {"compute_log_sumexp": False},
    EFFICIENT_BACKWARD: CUDNN_GRADIENTS | {"grad_input_mask": [True, True, True, False]},
}


def gradient_of(op: str) -> str:
    """Returns a backward op's name of its first argument."""
    return "grad_out_" if op == EFFICIENT_BACKWARD else "grad_out"


def reason(op: str, tensors: dict, **change) -> str:
    """Returns why the override of an op does not take a call. Every call here is one that it takes
    on no machine."""
    if op == CUDNN_INPLACE:
        tensors = {name: tensor[0] for name, tensor in tensors.items()}
    call = tensors | OTHERS[op]
    if op.endswith("_backward"):
        call |= {"out": tensors["query"], "logsumexp": ROWS}
        call[gradient_of(op)] = tensors["query"]
    if op.endswith("_inplace"):
        call["out"] = tensors["query"]
    with fa4_ext.register(fallback="error"), pytest.raises(RuntimeError) as error:
        if "registered at fa4_ext:" not in torch._C._dispatch_dump(f"aten::{op}"):
            pytest.skip(f"{op} is not overridden")
        overload(op).redispatch(CUDA, **(call | change))
    text = str(error.value).splitlines()[0]
    assert text.startswith(f"FA4 {op} unsupported: "), text
    return text.partition("unsupported: ")[2]


@pytest.mark.parametrize("op", ARGUMENTS_AND_RESULTS)
def test_every_override_is_reached_and_reads_dropout_and_devices(op):
    assert reason(op, qkv("cpu")) == "inputs must be CUDA tensors"
    if "dropout_p" in OTHERS[op]:
        assert reason(op, qkv("cpu"), dropout_p=0.5) == "dropout_p must be 0"


@pytest.mark.parametrize("op", ARGUMENTS_AND_RESULTS)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"query": {"dtype": torch.float64}}, "query dtype must be float16 or bfloat16"),
        ({"key": {"dtype": torch.float16}}, "query, key, value must have the same dtype"),
        ({"value": {"size": (2, 17, 8, 64)}}, "key and value must have the same shape"),
        ({"key": {"size": (2, 16, 8, 72)}}, "key's head_dim 72 differs from query's 64"),
    ],
)
def test_every_override_reads_query_key_and_value_at_their_places(op, change, expected):
    assert reason(op, qkv("cuda", **change)) == expected


@pytest.mark.parametrize(
    "op",
    [op for op in ARGUMENTS_AND_RESULTS if "cum_seq_q" in OTHERS[op] and op != CUDNN_INPLACE],
)
def test_overrides_with_lengths_read_them_at_their_places(op):
    if op.startswith("_cudnn") and VERSION < (2, 14):
        pytest.skip("packed calls are cuDNN's in this torch")
    for given in ("cum_seq_q", "cum_seq_k"):
        assert (
            reason(op, qkv("cuda"), **{given: ONE})
            == "cum_seq_q and cum_seq_k must be given together"
        )
    packed = (
        "cum_seq_q and cum_seq_k must be undefined for dense inputs"
        if "scaled_dot" in op
        else "ragged query must be 3D"
    )
    assert reason(op, qkv("cuda"), cum_seq_q=ONE, cum_seq_k=ONE) == packed


@pytest.mark.skipif(VERSION < (2, 15), reason="torch has the op since 2.15")
def test_cudnns_inplace_override_reads_lengths_at_their_places():
    given_together = "cum_seq_q and cum_seq_k must be given together"
    assert reason(CUDNN_INPLACE, qkv("cuda"), cum_seq_k=None) == given_together


@pytest.mark.parametrize("op", [op for op in ARGUMENTS_AND_RESULTS if "backward" in op])
def test_backward_overrides_read_the_gradient_first(op):
    assert reason(op, qkv("cuda"), **{gradient_of(op): None}) == "grad_out is undefined"


LATE = {
    "return_debug_mask": (True, "return_debug_mask must be False"),
    "alibi_slopes": (ONE, "alibi_slopes not supported"),
    "seqused_k": (ONE, "seqused_k not supported without cum_seq_k"),
    "block_table": (ONE, "block_table must come with seqused_k or cum_seq_k"),
    "num_splits": (-2, "num_splits must not be negative, is -2"),
}


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (op, name)
        for op, (arguments, _) in ARGUMENTS_AND_RESULTS.items()
        for name in LATE
        if f" {name}" in arguments
    ],
)
def test_forward_overrides_read_each_late_argument_at_its_place(op, name):
    value, expected = LATE[name]
    without = {"cum_seq_k": None} if "must come with" in expected or "without" in expected else {}
    change = {name: value} | {n: v for n, v in without.items() if n in OTHERS[op]}
    assert reason(op, qkv("cpu"), **change) == expected


@pytest.mark.parametrize(
    "op", [op for op, (arguments, _) in ARGUMENTS_AND_RESULTS.items() if " attn_bias" in arguments]
)
def test_overrides_read_the_bias_at_its_place(op):
    assert reason(op, qkv("cuda"), attn_bias=ONE) == "attn_bias must be on query's device"
