"""Checks, on the CPU, the check that a contender passes before it is timed: it lets rounding pass
and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fa4_ext.bench import correctness
from fa4_ext.bench.correctness import CORNERS, attention, check, corner_of, truth
from fa4_ext.bench.shapes import Shape, packed, square

SHAPES = {
    "full": square(2, 4, 40, 16, False),
    "causal": square(2, 4, 40, 16, True),
    "grouped": square(2, 4, 40, 16, True, heads_kv=2),
    "decode": Shape(3, 4, 1, 2, 50, 16, False),
    "one": square(1, 1, 40, 16, True),
    "varlen": packed(4, 2, 16, True, (7, 30, 3)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs_of(shape: Shape) -> list[torch.Tensor]:
    """Returns q, k, v, dO as make_inputs lays them out."""
    heads = (shape.heads, shape.heads_kv, shape.heads_kv, shape.heads)
    if shape.lengths:
        return [torch.randn(shape.total_q, h, shape.head_dim) for h in heads]
    rows = (shape.seqlen_q, shape.seqlen_k, shape.seqlen_k, shape.seqlen_q)
    return [
        torch.randn(shape.batch, n, h, shape.head_dim).transpose(1, 2)
        for n, h in zip(rows, heads, strict=True)
    ]


def torch_attention(shape: Shape, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns out, dq, dk, dv of the whole problem by torch and autograd."""
    *qkv, do = inputs
    leaves = [t.clone().requires_grad_() for t in qkv]
    if shape.lengths:
        pieces = zip(*(t.split(shape.lengths) for t in leaves), strict=True)
        calls = [[t.transpose(0, 1) for t in piece] for piece in pieces]
        outs = [
            F.scaled_dot_product_attention(*call, is_causal=shape.causal, enable_gqa=True)
            for call in calls
        ]
        out = torch.cat([out.transpose(0, 1) for out in outs])
    else:
        out = F.scaled_dot_product_attention(*leaves, is_causal=shape.causal, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


@pytest.mark.parametrize("rows", [7, 2048])
@pytest.mark.parametrize("name", SHAPES)
def test_the_truth_is_that_of_torch(monkeypatch, name, rows):
    monkeypatch.setattr(correctness, "ROWS", rows)
    shape = SHAPES[name]
    inputs = inputs_of(shape)
    expected = torch_attention(shape, inputs)
    for corner, found in zip(CORNERS, truth(shape, inputs), strict=True):
        for what, one, other in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            difference = (one - corner_of(other, shape, corner)).abs().max().item()
            assert difference <= 1e-5, f"{what} of corner {corner}: {difference:.1e}"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounded_outputs_pass(name, dtype):
    shape = SHAPES[name]
    inputs = inputs_of(shape)
    outputs = [t.to(correctness.DTYPES[dtype]) for t in torch_attention(shape, inputs)]
    assert (
        0
        < check(shape, dtype, tuple(outputs), truth(shape, inputs))
        < correctness.MAX_RELATIVE_ERROR[dtype] / 2
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "change",
    [
        lambda shape, outputs: [outputs[0] * 1.02, *outputs[1:]],
        lambda shape, outputs: [outputs[0], outputs[1], outputs[3], outputs[2]],
        lambda shape, outputs: [*outputs[:3], torch.full_like(outputs[3], float("nan"))],
        lambda shape, outputs: [outputs[0].roll(1, -2), *outputs[1:]],
        lambda shape, outputs: torch_attention(
            square(2, 4, 40, 16, not shape.causal), inputs_of(shape)
        ),
    ],
    ids=["scale", "swapped", "nan", "row", "mask"],
)
def test_wrong_outputs_do_not(change, dtype):
    shape = SHAPES["causal"]
    inputs = inputs_of(shape)
    outputs = change(shape, torch_attention(shape, inputs))
    with pytest.raises(RuntimeError, match=r"wrong: relative error .* against fp32"):
        check(shape, dtype, tuple(outputs), truth(shape, inputs))


def test_what_is_wrong_in_one_corner_alone_is_seen():
    shape = SHAPES["causal"]
    inputs = inputs_of(shape)
    for sequence, head in ((0, 0), (-1, -1)):
        outputs = torch_attention(shape, inputs)
        outputs[0][sequence, head, -1] += 1
        with pytest.raises(RuntimeError, match="wrong"):
            check(shape, "bf16", tuple(outputs), truth(shape, inputs))


def test_bottom_right_alignment():
    q, k, v, do = (torch.randn(1, rows, 16) for rows in (3, 5, 5, 3))
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
    out, *_ = attention(q, k, v, do, True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
