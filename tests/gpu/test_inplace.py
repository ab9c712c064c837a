"""`_flash_attention_forward_no_dropout_inplace`, which `varlen_attn_out` calls: the result goes
into a tensor of the caller's."""

from __future__ import annotations

from dataclasses import replace

import packed_rows
import pytest
import torch
from calls import TORCH_2_12, flash_forward, flash_forward_into
from cases import DEVICE, MASKS, dense, make_inputs, varlen
from compare import assert_matches_reference
from profiling import providers_of
from reference import Result

pytestmark = pytest.mark.skipif(not TORCH_2_12, reason="torch has this op since 2.12")

NAN = float("nan")


def contiguous(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, NAN)


def wider_rows(like: torch.Tensor) -> torch.Tensor:
    """Returns part of a larger tensor whose strides TMA can take."""
    return torch.full((*like.shape[:-1], like.shape[-1] + 8), NAN, dtype=like.dtype, device=DEVICE)[
        ..., :-8
    ]


def unaligned(like: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of strides that TMA cannot take, which is written by way of a copy."""
    return torch.full((*like.shape[:-1], like.shape[-1] + 3), NAN, dtype=like.dtype, device=DEVICE)[
        ..., :-3
    ]


def transposed(like: torch.Tensor) -> torch.Tensor:
    """Returns a tensor whose last dimension is not the contiguous one. It is written by way of a
    copy too."""
    return torch.full(
        (*like.shape[:-2], like.shape[-1], like.shape[-2]), NAN, dtype=like.dtype, device=DEVICE
    ).transpose(-1, -2)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("make_out", [contiguous, wider_rows, unaligned, transposed])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_result_is_written_where_the_caller_says(layout, mask, make_out):
    problem = (
        dense(203, 239, **MASKS[mask])
        if layout == "dense"
        else varlen((67, 1, 130, 0, 254), **MASKS[mask])
    )
    inputs = make_inputs(problem)
    out = make_out(inputs.q)
    address, strides = out.data_ptr(), out.stride()
    lse = flash_forward_into(out, problem, inputs)
    assert (out.data_ptr(), out.stride()) == (address, strides)
    assert_matches_reference(problem, inputs, Result(out, lse))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("make_out", [wider_rows, unaligned])
def test_nothing_beside_the_tensor_is_written(make_out):
    inputs = make_inputs(problem := dense(203, 239))
    out = make_out(inputs.q)
    flash_forward_into(out, problem, inputs)
    beside = out._base[..., out.shape[-1] :]
    assert beside.isnan().all(), f"{int((~beside.isnan()).sum())} elements beside out were written"


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("make_out", [contiguous, unaligned])
def test_rows_that_no_sequence_has_keep_what_they_hold(make_out):
    problem = varlen((67, 130))
    inputs = make_inputs(problem)
    given = packed_rows.amid(inputs, 3, 50)
    out = make_out(given.q)
    lse = flash_forward_into(out, problem, given)
    rows = slice(3, 3 + sum(problem.seqlens_q))
    assert_matches_reference(problem, inputs, Result(out[rows], lse[:, rows]))
    written = ~torch.cat((out[:3], out[rows.stop :])).isnan()
    assert not written.any(), f"{int(written.sum())} elements beside the sequences were written"


@pytest.mark.usefixtures("strict")
def test_bits_are_those_of_the_op_that_allocates():
    inputs = make_inputs(problem := varlen((67, 1, 130, 254), is_causal=True))
    out = contiguous(inputs.q)
    lse = flash_forward_into(out, problem, inputs)
    expected, expected_lse, *_ = flash_forward(problem, inputs)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.usefixtures("strict")
def test_out_that_repeats_its_elements_is_refused_as_pytorch_does():
    inputs = make_inputs(problem := dense(64, 64))
    with pytest.raises(
        RuntimeError,
        match=r"more than one element of the written-to tensor|copying into out failed",
    ):
        flash_forward_into(inputs.q[:1].expand_as(inputs.q), problem, inputs)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("wrong", [lambda t: t[:1], lambda t: t.float(), lambda t: t.half()])
def test_out_of_another_kind_than_query_is_not_ours(wrong):
    inputs = make_inputs(problem := dense(64, 64))
    with pytest.raises(
        RuntimeError, match="unsupported: out must have query's shape, with value's head_dim"
    ):
        flash_forward_into(wrong(contiguous(inputs.q)), problem, inputs)


def test_call_that_is_not_ours_is_written_by_the_stock_kernel(lenient):
    """PyTorch's kernel takes seqused_k of dense tensors, and does not look at it."""
    problem = dense(67, 130, is_causal=True)
    inputs = make_inputs(problem)
    out = contiguous(inputs.q)
    used = torch.full((problem.batch,), 130, dtype=torch.int32, device=DEVICE)
    assert "ours" not in providers_of(
        lambda: flash_forward_into(out, problem, inputs, seqused_k=used)
    )
    expected = flash_forward(problem, inputs, seqused_k=used)
    assert torch.equal(out, expected[0])


def test_varlen_attn_out_runs_ours(strict):
    from torch.nn.attention.varlen import varlen_attn_out

    problem = replace(varlen((67, 130, 254)), window=(-1, 0), is_causal=True)
    inputs = make_inputs(problem)
    out = contiguous(inputs.q)
    arguments = (
        out,
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        254,
        254,
    )
    assert providers_of(lambda: varlen_attn_out(*arguments, window_size=(-1, 0))) == {"ours"}
    assert_matches_reference(
        replace(problem, window=(-1, -1)), inputs, Result(out, None), check_lse=False
    )
