"""explain() on machines without a GPU: what runs, and the reason when it does not."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fa4_ext

HOPPER = (9, 0)


def qkv(
    batch=2,
    heads=8,
    seqlen=512,
    head_dim=128,
    *,
    heads_kv=None,
    seqlen_kv=None,
    dtype=torch.bfloat16,
    device="meta",
):
    """Returns tensors as F.scaled_dot_product_attention takes them."""
    query = torch.empty(batch, heads, seqlen, head_dim, dtype=dtype, device=device)
    key = torch.empty(
        batch, heads_kv or heads, seqlen_kv or seqlen, head_dim, dtype=dtype, device=device
    )
    return query, key, torch.empty_like(key)


def varlen(
    sequences=4, seqlen=1024, heads=8, head_dim=128, *, cu_dtype=torch.int32, dtype=torch.bfloat16
):
    tensor = torch.empty(sequences * seqlen, heads, head_dim, dtype=dtype, device="meta")
    return (tensor,) * 3, {
        "cu_seqlens_q": torch.empty(sequences + 1, dtype=cu_dtype, device="meta"),
        "max_seqlen_q": seqlen,
    }


def explain(*tensors, **options):
    return fa4_ext.explain(*tensors, **{"device_capability": HOPPER} | options)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_supported_call_names_a_kernel_of_the_build(capability, backward, is_causal, head_dim):
    arch = 90 if capability == HOPPER else 100
    if arch not in fa4_ext.build_info()["archs"]:
        pytest.skip(f"this build has no kernels for sm{arch}")
    # These lengths are more than is decoded.
    longer = qkv(head_dim=head_dim, seqlen=1024)
    answer = explain(*longer, is_causal=is_causal, backward=backward, device_capability=capability)
    assert answer.supported and answer.reason == ""
    assert answer.kernel in {kernel.name for kernel in fa4_ext.kernels()}
    assert answer.kernel.startswith(
        f"sm{arch}_{'backward' if backward else 'forward'}_bf16_d{head_dim}_dense"
    )
    assert ("causal" in answer.kernel) == is_causal
    assert answer.kernel.split("_2cta")[0].endswith("_m{}n{}".format(*answer.tile))
    assert (answer.workspace_bytes > 0) == backward and answer.fallback is None
    assert str(answer) == f"runs {answer.kernel}"


def test_explanation_is_frozen_and_prints_its_reason():
    answer = explain(*qkv(), dropout_p=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.supported = True
    assert (
        not answer.supported
        and answer.kernel is None
        and answer.tile is None
        and answer.workspace_bytes == 0
    )
    assert str(answer) == f"left to PyTorch's own kernels: {answer.reason}"


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        pytest.param(qkv(), {"dropout_p": 0.1}, "dropout_p must be 0", id="dropout"),
        pytest.param(
            qkv(dtype=torch.float32), {}, "dtype must be float16 or bfloat16", id="float32"
        ),
        pytest.param(
            (qkv()[0], *qkv(dtype=torch.float16)[1:]),
            {},
            "must have the same dtype",
            id="mixed dtypes",
        ),
        pytest.param(
            [torch.empty(8, 64, dtype=torch.bfloat16, device="meta")] * 3,
            {},
            "dense query must be 4D",
            id="rank",
        ),
        pytest.param(
            qkv(head_dim=512),
            {},
            r"head_dim must be at most \d+ .*, is 512",
            id="head dim too large",
        ),
        pytest.param(
            (*qkv()[:2], qkv(head_dim=264)[0]),
            {},
            r"value's head_dim must be at most 256 .*, is 264",
            id="value head dim",
        ),
        pytest.param(
            (qkv()[0], *qkv(head_dim=64)[1:]),
            {},
            "head_dim 64 differs from query's 128",
            id="key head dim",
        ),
        pytest.param(
            qkv(seqlen=0, seqlen_kv=16),
            {},
            "0 rows and key 16: .*never takes empty ones",
            id="empty query",
        ),
        pytest.param(
            (qkv(seqlen=16)[0], *qkv(seqlen=0)[1:]),
            {},
            "16 rows and key 0: .*never takes empty ones",
            id="empty key",
        ),
        pytest.param(
            (qkv()[0], *qkv(batch=3)[1:]), {}, "batch 3 differs from query's 2", id="batch"
        ),
        pytest.param(
            qkv(heads=6, heads_kv=4),
            {"enable_gqa": True},
            "6, is not a multiple of .* 4",
            id="heads not divisible",
        ),
        pytest.param(qkv(heads_kv=4), {}, "needs enable_gqa=True", id="gqa not enabled"),
        pytest.param(
            qkv(seqlen_kv=256, heads_kv=4),
            {"is_causal": True, "enable_gqa": True, "deterministic": True},
            "to cuDNN alone, .*causal_lower_right",
            id="causal, other key length, grouped, deterministic",
        ),
        pytest.param(
            qkv(), {"device_capability": (8, 0)}, "compute capability .* 8.0", id="Ampere"
        ),
        pytest.param(
            qkv(),
            {"device_capability": (12, 0)},
            "compute capability .* 12.0",
            id="consumer Blackwell",
        ),
        pytest.param(
            [t.mT.contiguous().mT for t in qkv()],
            {},
            "contiguous last dimension",
            id="head dim not contiguous",
        ),
    ],
)
def test_reason_says_why_not(tensors, options, reason):
    answer = explain(*tensors, **options)
    assert not answer.supported
    assert re.search(reason, answer.reason), answer.reason


@pytest.mark.parametrize("backward", (False, True))
def test_without_queries_no_kernel_is_needed(backward):
    answer = explain(*qkv(batch=0), backward=backward)
    assert (answer.supported, answer.kernel, answer.tile, answer.workspace_bytes) == (
        True,
        None,
        None,
        0,
    ), answer
    assert (
        str(answer)
        == "runs no kernel (there are no queries, or no keys: results are zeros, or have no "
        "elements)"
    )


@pytest.mark.parametrize(
    ("view", "copied"),
    [
        pytest.param(lambda t: t, "", id="contiguous"),
        pytest.param(
            lambda t: t.new_empty(t.numel() + 1)[1:].view(t.shape),
            "query, key, value",
            id="address not aligned",
        ),
        pytest.param(
            lambda t: t.new_empty(*t.shape[:3], 132)[..., :128],
            "query, key, value",
            id="stride not aligned",
        ),
        pytest.param(lambda t: t.new_empty(1, *t.shape[1:]).expand(t.shape), "", id="expanded"),
    ],
)
def test_answer_names_the_inputs_that_are_copied(view, copied):
    answer = explain(*(view(tensor) for tensor in qkv()))
    assert answer.supported
    assert answer.reason == (
        f"copied first, because TMA takes addresses and strides of 16 bytes only: {copied}"
        if copied
        else ""
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"return_debug_mask": True}, "return_debug_mask must be False"),
        ({"alibi_slopes": torch.empty(8, device="meta")}, "alibi_slopes not supported"),
        (
            {"seqused_k": torch.empty(2, dtype=torch.int32, device="meta")},
            "seqused_k not supported without cum_seq_k",
        ),
        (
            {"block_table": torch.empty(2, 4, dtype=torch.int32, device="meta")},
            "block_table must come with seqused_k or cum_seq_k",
        ),
        ({"num_splits": -2}, "num_splits must not be negative, is -2"),
        ({"capability": 0}, "inputs must be CUDA tensors"),  # 0: query's own device
    ],
)
def test_reason_names_the_low_level_ops_own_arguments(arguments, reason):
    query = qkv()[0].transpose(1, 2)
    assert explain_op(query)[0]
    assert explain_op(query, **arguments) == (False, "", reason, 0, 0, 0)


def explain_op(query, **arguments):
    """Runs torch.ops.fa4_ext.explain of a call with key and value like query that runs but for
    these arguments."""
    tensors = ("cum_seq_q", "cum_seq_k", "seqused_k", "alibi_slopes", "block_table")
    nothing = dict.fromkeys(
        (*tensors, "scale", "window_size_left", "window_size_right", "num_splits")
    )
    plain = dict.fromkeys(("is_causal", "return_debug_mask", "deterministic", "backward"), False)
    numbers = {
        "max_q": 512,
        "max_k": 512,
        "dropout_p": 0.0,
        "speed_rules": True,
        "capability": 90,
        "sm_count": 132,
    }
    return torch.ops.fa4_ext.explain(query, query, query, **(nothing | plain | numbers | arguments))


@pytest.mark.parametrize(
    ("used", "reason"),
    [
        (torch.empty(4, dtype=torch.int32, device="meta"), ""),
        (torch.empty(4, dtype=torch.int64, device="meta"), "seqused_k must be int32"),
        (
            torch.empty(5, dtype=torch.int32, device="meta"),
            "seqused_k must be 1D with batch elements",
        ),
        (
            torch.empty(4, 1, dtype=torch.int32, device="meta"),
            "seqused_k must be 1D with batch elements",
        ),
        (torch.empty(8, dtype=torch.int32, device="meta")[::2], "seqused_k must be contiguous"),
        (torch.empty(4, dtype=torch.int32, device="cpu"), "seqused_k must be on query's device"),
    ],
    ids=["int32", "int64", "length", "2d", "strided", "device"],
)
def test_varlen_takes_the_number_of_keys_in_use(used, reason):
    (query, _, _), lengths = varlen(sequences=4, seqlen=512)
    cum_seq = lengths["cu_seqlens_q"]
    supported, kernel, answer, *_ = explain_op(
        query, cum_seq_q=cum_seq, cum_seq_k=cum_seq, seqused_k=used
    )
    assert (supported, answer) == (not reason, reason)
    assert ("varlen" in kernel) == supported


@pytest.mark.parametrize(
    ("longest", "ours"),
    [((8, 8), False), ((8, 0), True), ((0, 8), True), ((0, 0), True)],
    ids=str,
)
def test_no_rule_leaves_a_longest_of_zero_to_pytorch(longest, ours):
    """PyTorch's backward cannot be launched for it. Ours goes by the rows that there are."""
    (query, _, _), lengths = varlen(sequences=512, seqlen=8)
    cum_seq = lengths["cu_seqlens_q"]
    supported, _, reason, *_ = explain_op(
        query, cum_seq_q=cum_seq, cum_seq_k=cum_seq, max_q=longest[0], max_k=longest[1],
        backward=True,
    )  # fmt: skip
    assert supported == ours, reason


@pytest.mark.parametrize(
    "scale", (0.0, -0.0, -0.125, 1e-40, 1e-320, 1e40, float("inf"), float("nan"))
)
def test_scale_that_no_kernel_computes_with(scale):
    """What is masked is -inf before it is scaled: 0 makes it NaN, and a negative scale makes it the
    largest score of all."""
    answer = explain(*qkv(), scale=scale)
    assert not answer.supported and answer.reason.startswith(
        "scale must be a positive normal number of float32, is "
    )
    assert answer.fallback == "cudnn"


@pytest.mark.parametrize("scale", (None, 1e-30, 0.125, 3.0))
def test_scale_that_the_kernels_compute_with(scale):
    assert explain(*qkv(), scale=scale).supported


@pytest.mark.parametrize(
    ("bound", "max_seqlen_k", "supported"),
    [(299, 9999, False), (300, 9999, False), (300, 300, True)],
)
def test_window_bound_between_the_rows_of_key_and_max_seqlen_k(bound, max_seqlen_k, supported):
    """PyTorch's kernel keeps such a right bound, whatever the rows; one of max_seqlen_k or more it
    drops."""
    query, key = (
        torch.empty(rows, 8, 128, dtype=torch.bfloat16, device="meta") for rows in (900, 299)
    )
    starts = torch.empty(2, dtype=torch.int32, device="meta")
    lengths = dict(
        cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=900, max_seqlen_k=max_seqlen_k
    )
    answer = explain(query, key, key, window_size=(-1, bound), **lengths)
    assert answer.supported == supported, answer.reason
    assert supported or "less than max_k, 9999, but not than key's 299 rows" in answer.reason


def test_gqa_and_mqa_are_supported():
    for heads_kv in (1, 2, 4):
        assert explain(*qkv(heads_kv=heads_kv), enable_gqa=True).supported


def test_a_causal_mask_over_more_keys_than_queries_is_planned_over_as_many():
    longer = explain(*qkv(seqlen=300, seqlen_kv=700), is_causal=True)
    assert longer.kernel == explain(*qkv(seqlen=300), is_causal=True).kernel is not None


def test_prefer_false_leaves_to_cudnn_what_comes_to_it():
    with fa4_ext.register(prefer=False):
        answer = explain(*qkv())
        assert (answer.reason, answer.fallback) == ("prefer=False leaves it to cuDNN", "cudnn")
        assert explain(*qkv(seqlen_kv=1)).supported


def test_unequal_head_dims_are_supported():
    assert explain(*qkv()[:2], qkv(head_dim=64)[2]).supported


def test_different_lengths_without_a_mask_are_supported():
    assert explain(*qkv(seqlen=300, seqlen_kv=700)).supported


def test_head_dim_that_sdpa_pads_is_explained_as_padded():
    padded = explain(*qkv(head_dim=100))
    assert padded.kernel == explain(*qkv(head_dim=104)).kernel is not None
    assert padded.reason == "F.scaled_dot_product_attention pads head_dim 100 to 104 first"


def test_workspace_grows_with_the_call_and_with_shared_heads():
    def workspace(**different):
        with fa4_ext.register(speed_rules=False):
            return explain(*qkv(**different), enable_gqa=True, backward=True).workspace_bytes

    dq_accumulator = 4 * 2 * 8 * 512 * 128
    assert dq_accumulator < workspace() < workspace(heads_kv=2)
    assert workspace(batch=4) == 2 * workspace()


def test_what_gets_a_call_that_is_not_supported():
    def fallback(*tensors, **options):
        return explain(*tensors, **options).fallback

    assert fallback(*qkv(), dropout_p=0.1) == fallback(*qkv(), scale=-1.0) == "cudnn"
    assert fallback(*qkv(), device_capability=(8, 0)) == "flash"
    deterministic = {"deterministic": True}
    assert fallback(*qkv(), dropout_p=0.1, **deterministic) == "flash"
    assert fallback(*qkv(seqlen_kv=256), is_causal=True, dropout_p=0.1, **deterministic) == (
        "efficient"
    )
    assert fallback(*qkv(head_dim=264)) == "efficient"
    # F.scaled_dot_product_attention takes these to none of these three.
    assert fallback(*qkv(dtype=torch.float32)) == "other"
    assert fallback(*qkv(), device_capability=(7, 5)) == fallback(*qkv(seqlen=0)) == "other"
    assert fallback(*qkv(heads_kv=4)) == "other"
    assert fallback(*qkv(heads=6, heads_kv=4), enable_gqa=True) == "other"
    assert fallback(*(tensor.mT.contiguous().mT for tensor in qkv())) == "other"
    # F.scaled_dot_product_attention has no part in these: varlen, and a window.
    tensors, lengths = varlen(dtype=torch.float32)
    assert (
        fallback(*tensors, **lengths)
        == fallback(*qkv(dtype=torch.float32), window_size=(128, 0))
        == "flash"
    )


@pytest.mark.parametrize(
    ("tensors", "options"),
    [
        pytest.param((*qkv()[:2], qkv(head_dim=64)[0]), {}, id="value head dim"),
        pytest.param(qkv(seqlen_kv=256), {"is_causal": True}, id="causal, fewer keys"),
        pytest.param(qkv(seqlen_kv=600), {"is_causal": True}, id="causal, more keys"),
    ],
)
def test_what_memory_efficient_attention_gets_where_algorithms_are_deterministic(tensors, options):
    answer = explain(*tensors, **options, backward=True, deterministic=True)
    if "subset" in answer.reason:
        pytest.skip(answer.reason)
    assert answer.supported, answer.reason
    with fa4_ext.register(prefer=False):
        answer = explain(*tensors, **options, deterministic=True)
    assert answer.reason == "prefer=False leaves it to memory-efficient attention"
    assert answer.fallback == "efficient"


def test_sliced_and_expanded_inputs_are_supported():
    query = torch.empty(2, 512, 3, 8, 128, dtype=torch.bfloat16, device="meta").permute(
        2, 0, 3, 1, 4
    )
    assert explain(*query).supported
    query, key, _ = qkv(heads_kv=1)
    assert explain(query, *(key.expand_as(query),) * 2).supported


def test_varlen_defaults_key_lengths_to_the_querys():
    tensors, lengths = varlen()
    short = explain(*tensors, **lengths)
    spelled_out = explain(
        *tensors,
        **lengths,
        cu_seqlens_k=lengths["cu_seqlens_q"],
        max_seqlen_k=lengths["max_seqlen_q"],
    )
    assert short == spelled_out and short.supported and "varlen" in short.kernel


def test_varlen_causal_takes_different_lengths():
    tensors, lengths = varlen()
    assert explain(*tensors, **lengths, is_causal=True, max_seqlen_k=200).supported


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(128, 64), (64, 128)])
@pytest.mark.parametrize("backward", [False, True])
def test_varlen_takes_a_value_head_dim_of_its_own(head_dim, head_dim_v, backward):
    ((query, key, _), lengths), ((_, _, value), _) = (
        varlen(head_dim=head_dim),
        varlen(head_dim=head_dim_v),
    )
    answer = explain(query, key, value, **lengths, backward=backward)
    assert answer.supported and "_d128_varlen_" in answer.kernel


def int32(*shape):
    return torch.empty(shape, dtype=torch.int32, device="meta")


@pytest.mark.parametrize(
    ("pages", "options", "reason"),
    [
        ((64, 256), {"seqused_k": int32(4)}, ""),
        ((64, 256), {"seqused_k": int32(4), "num_splits": 3}, ""),
        ((64, 256), {"cu_seqlens_k": int32(5)}, ""),
        ((64, 256), {}, "block_table must come with seqused_k or cum_seq_k"),
        ((64, 16), {"seqused_k": int32(4)}, ""),
        (
            (64, 24),
            {"seqused_k": int32(4)},
            "a page of block_table must hold a multiple of 16 keys, holds 24",
        ),
        ((64, 256), {"seqused_k": int32(5)}, "seqused_k must be 1D with batch elements"),
    ],
)
def test_keys_in_pages(pages, options, reason):
    query = torch.empty(4, 8, 128, dtype=torch.bfloat16, device="meta")
    cache = torch.empty(*pages, 2, 128, dtype=torch.bfloat16, device="meta")
    lengths = {"cu_seqlens_q": int32(5), "max_seqlen_q": 1, "max_seqlen_k": 4096}
    table = int32(4, 4096 // pages[1])
    answer = explain(query, cache, cache, **lengths, block_table=table, **options)
    assert answer.reason == reason and answer.supported == (not reason)
    assert reason or answer.kernel.startswith("sm90_decode_bf16_d128")


MANY = 2**30
TOO_MANY = "must each be less than 2^30, are 1073741824"


@pytest.mark.parametrize(
    ("keys", "options", "reason"),
    [
        ((MANY,), {}, f"queries and keys of all sequences {TOO_MANY}"),
        (
            (MANY // 256, 256),
            {"block_table": int32(4, 16)},
            f"queries of all sequences and keys of all pages {TOO_MANY}",
        ),
        (
            (64, 256),
            {"block_table": int32(4, MANY // 256)},
            "a row of block_table must hold less than 2^30 keys, holds 1073741824",
        ),
    ],
    ids=["packed", "all_pages", "a_row_of_the_table"],
)
def test_2_30_keys_are_too_many_and_the_reason_says_where_they_are(keys, options, reason):
    query = torch.empty(4, 8, 128, dtype=torch.bfloat16, device="meta")
    key = torch.empty(*keys, 2, 128, dtype=torch.bfloat16, device="meta")
    lengths = {"cu_seqlens_q": int32(5), "cu_seqlens_k": int32(5), "max_seqlen_q": 1}
    answer = explain(query, key, key, **lengths, max_seqlen_k=4096, **options)
    assert (answer.supported, answer.reason) == (False, reason)


@pytest.mark.parametrize("options", [{}, {"seqused_k": int32(4)}, {"num_splits": 5}], ids=str)
def test_few_queries_are_decoded(options):
    (query, _, _), lengths = varlen(seqlen=8)
    (_, key, value), _ = varlen(seqlen=8192)
    lengths |= {"cu_seqlens_k": lengths["cu_seqlens_q"], "max_seqlen_k": 8192}
    assert explain(query, key, value, **lengths, **options).kernel.startswith(
        "sm90_decode_bf16_d128"
    )


@pytest.mark.parametrize("missing", ["cu_seqlens_q", "max_seqlen_q"])
def test_varlen_without_lengths_raises(missing):
    tensors, lengths = varlen()
    lengths.pop(missing)
    with pytest.raises(
        ValueError, match="3-D query, key and value need cu_seqlens_q and max_seqlen_q"
    ):
        explain(*tensors, **lengths)


def test_varlen_cu_seqlens_of_int64_are_not_supported():
    tensors, lengths = varlen(cu_dtype=torch.int64)
    assert "cum_seq_q must be int32" in explain(*tensors, **lengths).reason


def test_window_is_explained_by_the_window_kernel_or_its_absence():
    answer = explain(*qkv(seqlen=1024), window_size=(128, 0))  # more queries than decode takes
    windowed = [kernel for kernel in fa4_ext.kernels() if "_window_" in kernel.name]
    assert answer.supported == bool(windowed)
    assert "window" in answer.kernel if windowed else "subset" in answer.reason


def test_window_with_causal_is_bottom_right_aligned_and_takes_unequal_lengths():
    answer = explain(*qkv(seqlen=256, heads_kv=4), is_causal=True, window_size=(1024, -1))
    assert (
        answer == explain(*qkv(seqlen=256, heads_kv=4), window_size=(1024, 0)) and answer.supported
    )
    assert (
        "head_dim must be a multiple of 8"
        in explain(*qkv(head_dim=100), window_size=(1024, 0)).reason
    )


def test_windows_of_minus_one_and_of_the_whole_length_are_none():
    full = explain(*qkv())
    assert explain(*qkv(), window_size=(-1, -1)) == explain(*qkv(), window_size=(512, 512)) == full


def test_deterministic_follows_torch_unless_given():
    def kernel(**options):
        return explain(*qkv(), backward=True, **options)

    asked, not_asked = kernel(deterministic=True), kernel(deterministic=False)
    assert asked != not_asked
    try:
        torch.use_deterministic_algorithms(True)
        assert kernel() == asked and kernel(deterministic=False) == not_asked
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert kernel() == not_asked
    finally:
        torch.use_deterministic_algorithms(False)


def test_meta_cpu_and_fake_tensors_get_the_same_answer():
    with FakeTensorMode():
        fake = explain(*qkv(device="cuda"))
    assert explain(*qkv()) == explain(*qkv(device="cpu")) == fake


def test_no_device_capability_for_a_meta_tensor_raises():
    with pytest.raises(
        ValueError, match=r"device_capability is needed, such as \(9, 0\): query is on meta"
    ):
        fa4_ext.explain(*qkv())


def test_kernels_and_build_info_describe_one_build():
    kernels = fa4_ext.kernels()
    assert (
        isinstance(kernels, tuple) and len({kernel.name for kernel in kernels}) == len(kernels) > 0
    )
    assert {kernel.arch for kernel in kernels} == set(fa4_ext.build_info()["archs"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        kernels[0].name = "other"


def test_sdpa_takes_no_unequal_head_dims_of_query_and_key():
    query, key = (
        torch.empty(2, 4, 16, size, dtype=torch.bfloat16, device="meta") for size in (60, 64)
    )
    explanation = fa4_ext.explain(query, key, key, device_capability=HOPPER)
    assert not explanation.supported
    assert explanation.reason == "key's head_dim 64 differs from query's 60"


@pytest.mark.parametrize("capability", [(9,), "sm90", 90, (8, 10), (0, 0), (9, 0, 0)], ids=str)
def test_device_capability_that_is_none_raises(capability):
    with pytest.raises(
        ValueError,
        match=re.escape(f"device_capability must be two numbers such as (9, 0), is {capability!r}"),
    ):
        fa4_ext.explain(*qkv(), device_capability=capability)


@pytest.mark.parametrize("window_size", [(1,), (1, 2, 3)], ids=str)
def test_window_size_that_is_no_pair_raises(window_size):
    with pytest.raises(
        ValueError,
        match=re.escape(f"window_size must be two numbers, left and right, is {window_size!r}"),
    ):
        fa4_ext.explain(*qkv(), window_size=window_size, device_capability=HOPPER)


def op_explain(capability: int, sm_count: int, device: str = "meta"):
    """Calls the op itself, as C++ programs do."""
    x = torch.empty(1, 128, 2, 64, dtype=torch.bfloat16, device=device)
    lengths = (None, None, 128, 128)
    options = (0.0, False, False, None, None, None, None, None, None, None, False, False, True)
    return torch.ops.fa4_ext.explain(x, x, x, *lengths, *options, capability, sm_count)


@pytest.mark.parametrize("sm_count", [-1, 0, 1025, 2**31, 2**32 + 132, 2**62, -(2**63)])
def test_an_sm_count_that_no_device_has_is_named_with_what_is_allowed(sm_count):
    with pytest.raises(
        RuntimeError,
        match=f"sm_count, the device's SMs, must be from 1 to 1024 with a capability of 90; is "
        rf"{sm_count}$",
    ):
        op_explain(90, sm_count)


@pytest.mark.parametrize(
    "capability", [-1, -90, 1, 9, 1000, 2**31, 2**32 + 90, 2**63 - 1, -(2**63)]
)
def test_a_capability_that_no_device_has_is_named_with_what_is_allowed(capability):
    with pytest.raises(
        RuntimeError,
        match=rf"capability must be 0, .*, from 10 to 999, such as 90; is {capability}$",
    ):
        op_explain(capability, 132)


@pytest.mark.parametrize("sm_count", [-1, 1025, 2**40])
def test_an_sm_count_beside_the_query_s_own_device_is_looked_at_too(sm_count):
    with pytest.raises(
        RuntimeError,
        match=f"sm_count, the device's SMs, must be from 0 to 1024 with a capability of 0; is "
        rf"{sm_count}$",
    ):
        op_explain(0, sm_count, device="cpu")


@pytest.mark.parametrize(
    ("capability", "sm_count"),
    [(90, 1), (90, 1024), (103, 160), (999, 16), (10, 16), (0, 0), (0, 132)],
)
def test_what_a_device_may_have_is_planned_for(capability, sm_count):
    supported, _, reason, *_ = op_explain(
        capability, sm_count, device="meta" if capability else "cpu"
    )
    assert (
        supported == (capability in (90, 103)) or "not compiled" in reason or "no kernel" in reason
    ), (supported, reason)


def test_num_splits_of_the_forward_does_not_concern_the_backward():
    tensors, lengths = varlen()
    answer = explain(*tensors, **lengths, num_splits=4, backward=True)
    assert answer.kernel == explain(*tensors, **lengths, backward=True).kernel is not None


def test_a_dense_backward_runs_where_its_forward_does_on_cudnn():
    """It takes our seed for a sign that our forward ran."""
    q, k, v = (
        torch.empty(4, 16, rows, 64, dtype=torch.bfloat16, device="meta")
        for rows in (512, 2048, 2048)
    )
    forward, backward = (explain(q, k, v, backward=backward) for backward in (False, True))
    assert not forward.supported and "cuDNN is faster" in forward.reason
    assert (backward.supported, backward.reason, backward.fallback) == (
        False, forward.reason, "cudnn",
    )  # fmt: skip


def mask(*shape, dtype=torch.bfloat16, **options):
    return torch.empty(*shape, dtype=dtype, device="meta", **options)


def bias_kernels_are_built() -> bool:
    return any("_bias_" in kernel.name for kernel in fa4_ext.kernels())


COPIED = "copied first, because the kernels read pairs of keys, at multiples of 4 bytes: attn_bias"


@pytest.mark.parametrize(
    ("attn_mask", "note"),
    [
        pytest.param(mask(2, 1, 512, 512), "", id="of sequences"),
        pytest.param(mask(512, 512), "", id="2-D"),
        pytest.param(mask(2, 1, 1, 512, dtype=torch.bool), "", id="bool, of keys"),
        pytest.param(mask(2, 1, 1, 512).expand(2, 8, 512, 512), "", id="expanded"),
        pytest.param(mask(2, 8, 1, 512), "", id="of keys, for each head"),
        pytest.param(mask(2, 8, 1, 512).expand(2, 8, 512, 512), "", id="of heads, expanded"),
        pytest.param(mask(512, 513)[:, 1:], COPIED, id="odd rows"),
        pytest.param(mask(512, 513, dtype=torch.bool)[:, 1:], "", id="bool, which is made anew"),
        pytest.param(mask(512, 1), COPIED, id="of queries"),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("heads_kv", [8, 2])
def test_a_mask_gets_kernels_of_its_own_on_hopper(attn_mask, note, backward, heads_kv):
    if not bias_kernels_are_built():
        pytest.skip("this build has no kernels with a bias")
    answer = explain(
        *qkv(heads_kv=heads_kv),
        attn_mask=attn_mask,
        enable_gqa=True,
        backward=backward,
    )
    op = "backward_keys" if backward else "forward"
    assert answer.supported and answer.kernel.startswith(f"sm90_{op}_bf16_d128_dense_bias_")
    assert answer.reason == note and answer.workspace_bytes > 0


@pytest.mark.parametrize(
    ("attn_mask", "ours"),
    [
        pytest.param(mask(4, 512), False, id="rows"),
        pytest.param(mask(4, 520)[:, 8:], False, id="rows at 16 bytes"),
        pytest.param(mask(4, 520)[:, 4:-4], True, id="rows at 8 bytes"),
        pytest.param(mask(4, 1), True, id="one key"),
        pytest.param(mask(4, 514, dtype=torch.bool)[:, 2:], False, id="bool, which is made anew"),
    ],
)
def test_no_rule_leaves_a_mask_to_cudnn_that_it_faults_on(attn_mask, ours):
    if not bias_kernels_are_built():
        pytest.skip("this build has no kernels with a bias")
    query, key, value = qkv(seqlen=4, seqlen_kv=512)
    answer = explain(query, key, value, attn_mask=attn_mask)
    assert answer.supported == ours, answer


def test_an_odd_number_of_keys_makes_rows_that_are_copied_beside_an_input():
    if not bias_kernels_are_built():
        pytest.skip("this build has no kernels with a bias")
    query, key, value = qkv(seqlen=513)
    query = torch.empty(2, 8, 513, 132, dtype=query.dtype, device="meta")[..., :128]
    for attn_mask in (mask(513, 513), mask(513, 513, dtype=torch.bool)):
        answer = explain(query, key, value, attn_mask=attn_mask)
        tma = "copied first, because TMA takes addresses and strides of 16 bytes only: query"
        assert answer.reason == f"{tma}; {COPIED}"


TO_TWO = (
    "F.scaled_dot_product_attention takes a call with attn_mask to cuDNN or memory-efficient "
    "attention"
)


@pytest.mark.parametrize(
    ("attn_mask", "options", "reason", "fallback"),
    [
        (mask(512, 512), {"is_causal": True}, "attn_bias with is_causal not supported", "cudnn"),
        (mask(512, 512), {"dropout_p": 0.5}, "dropout_p must be 0", "cudnn"),
        (
            mask(2, 8, 512, 512), {},
            "cuDNN is faster where each head has a bias of its own", "cudnn",
        ),
        (
            mask(512, 512, dtype=torch.float32), {},
            "attn_bias must have query's dtype, which a bool attn_mask gets first", "cudnn",
        ),
        (
            mask(512, 512), {"device_capability": (10, 0)},
            "attn_bias is not supported on compute capability 10.0 in this build", "cudnn",
        ),
        (
            mask(512, 512), {"device_capability": (8, 0)},
            "FA4 requires compute capability 9.0, 10.0 or 10.3, the device has 8.0", "efficient",
        ),
        (
            mask(512, 512, requires_grad=True), {"backward": True},
            "no kernel computes the gradient of attn_bias", "efficient",
        ),
        (
            mask(3, 1, 512, 512), {},
            f"{TO_TWO}, and not this one: attn_mask has the shape (3, 1, 512, 512), which "
            "does not broadcast to (2, 8, 512, 512)", "other",
        ),
        (
            mask(512, 1).expand(512, 512), {},
            f"{TO_TWO}, and not this one: attn_mask has a stride of 0, not 1, in its last "
            "dimension", "other",
        ),
    ],
)  # fmt: skip
def test_a_mask_that_our_kernels_do_not_run_has_a_reason(attn_mask, options, reason, fallback):
    answer = explain(*qkv(), attn_mask=attn_mask, **options)
    assert not answer.supported
    assert (answer.reason, answer.fallback) == (reason, fallback)


def test_a_forward_whose_mask_requires_a_gradient_is_ours_all_the_same():
    if not bias_kernels_are_built():
        pytest.skip("this build has no kernels with a bias")
    assert explain(*qkv(), attn_mask=mask(512, 512, requires_grad=True)).supported


@pytest.mark.parametrize(
    ("attn_mask", "deterministic"), [(mask(512, 512), True), (mask(8, 512, 512), False)], ids=str
)
def test_a_mask_that_cudnn_does_not_take_comes_by_memory_efficient_attention(
    attn_mask, deterministic
):
    if not bias_kernels_are_built():
        pytest.skip("this build has no kernels with a bias")
    for backward in (False, True):
        options = {"attn_mask": attn_mask, "deterministic": deterministic, "backward": backward}
        assert explain(*qkv(), **options).supported
        grouped = explain(*qkv(heads_kv=2), **options, enable_gqa=True)
        assert grouped.reason.startswith(TO_TWO) and grouped.fallback == "other"


def test_head_dims_that_cudnn_does_not_take_go_to_neither_with_a_mask():
    answer = explain(*qkv(head_dim=100), attn_mask=mask(512, 512))
    assert answer.reason == f"{TO_TWO}, which do not run this call"
    assert answer.fallback == "other"


def test_a_mask_beside_what_it_does_not_go_with_is_an_error():
    tensors, lengths = varlen()
    for call in (lambda m: explain(*tensors, attn_mask=m, **lengths),
                 lambda m: explain(*qkv(), attn_mask=m, window_size=(-1, 0))):  # fmt: skip
        with pytest.raises(ValueError, match="attn_mask is for 4-D query, key and value without"):
            call(mask(512, 512))
    from torch.nn.attention.bias import causal_lower_right

    with pytest.raises(ValueError, match="causal_lower_right window_size=\\(-1, 0\\)"):
        explain(*qkv(), attn_mask=causal_lower_right(512, 512))


def test_neither_flash_attention_nor_our_own_op_takes_a_mask():
    query, key, value = (tensor.transpose(1, 2) for tensor in qkv())
    answer = torch.ops.fa4_ext.explain(
        *(query, key, value, None, None, 512, 512, 0.0, False, False),
        *(None, None, None, None, None, None, None, False, False, False, 90, 132),
        own=True,
        attn_mask=mask(512, 512),
    )
    assert answer[:3] == (False, "", "attn_bias not supported")
