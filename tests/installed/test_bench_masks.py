"""The masks of `python -m fa4_ext bench --grid masks`, on the CPU: what they hide, and that every
contender is given the same problem."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fa4_ext.bench import contenders, masks
from fa4_ext.bench.correctness import check, make_inputs, truth
from fa4_ext.bench.grids import GRIDS
from fa4_ext.bench.shapes import Shape, square

SEQLEN = 48


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Makes windows and documents fit a few rows, and puts the inputs on the CPU."""
    torch.manual_seed(0)
    monkeypatch.setattr(masks, "WINDOW_SIZE", 10)
    monkeypatch.setattr(masks, "SHORTEST", 5)
    monkeypatch.setattr(masks, "LONGEST", 30)
    randn = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *sizes, **options: randn(*sizes, **options | {"device": "cpu"})
    )


def shape_of(kind: str) -> Shape:
    return square(3, 4, SEQLEN, 16, False, heads_kv=2, name=kind, mask=kind)


def seen(kind: str, sequence: int, row: int, key: int) -> bool:
    shape = shape_of(kind)
    rows = masks.rows_in_use(shape)[sequence]
    starts = [0, *torch.tensor(masks.documents(SEQLEN)).cumsum(0).tolist()]
    return {
        masks.RIGHT: lambda: key < rows.stop,
        masks.LEFT: lambda: key == row or rows.start <= key <= row,
        masks.CAUSAL: lambda: key <= row,
        masks.WINDOW: lambda: row - 10 < key <= row,
        masks.DOCUMENTS: lambda: max(start for start in starts if start <= row) <= key <= row,
        masks.PREFIX: lambda: key <= row or key < SEQLEN // 4,
        masks.SLOPES: lambda: True,
    }[kind]()


@pytest.mark.parametrize("kind", masks.KINDS)
def test_a_mask_hides_what_its_name_says(kind):
    shape = shape_of(kind)
    mask = masks.make_mask(shape, torch.empty(0, dtype=torch.bfloat16))
    assert mask.bias.dtype == torch.bfloat16
    visible = (mask.bias != float("-inf")).expand(3, 4, SEQLEN, SEQLEN)
    expected = [
        [[seen(kind, b, row, key) for key in range(SEQLEN)] for row in range(SEQLEN)]
        for b in range(3)
    ]
    assert torch.equal(visible, torch.tensor(expected)[:, None].expand_as(visible))
    assert shape.flops("forward") == 4 * 16 * visible.sum().item()
    if kind != masks.SLOPES:
        assert set(mask.bias.unique().tolist()) == {float("-inf"), 0.0}


def test_padding_is_a_tenth_to_a_half_of_the_keys():
    lengths = [rows.stop for rows in masks.rows_in_use(shape_of(masks.RIGHT))]
    assert lengths == [SEQLEN - rows for rows in (8, 14, 21)]
    assert sum(masks.documents(SEQLEN)) == SEQLEN


def by_sdpa(q, k, v, *arguments, attn_mask=None, is_causal=False, **options):
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=True
    )


def by_varlen(q, k, v, cu_seqlens, longest, causal):
    lengths = cu_seqlens.diff().tolist()
    assert max(lengths) == longest
    pieces = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    outs = [by_sdpa(*(t.transpose(0, 1) for t in piece), is_causal=causal) for piece in pieces]
    return torch.cat([out.transpose(0, 1) for out in outs])


def by_window(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, **window):
    """In place of torch.ops.aten._flash_attention_forward."""
    assert causal and window == {"window_size_left": 9, "window_size_right": 0}
    row = torch.arange(max_q)
    distance = row[:, None] - row
    qkv = (t.transpose(1, 2) for t in (q, k, v))
    return (by_sdpa(*qkv, attn_mask=(distance >= 0) & (distance <= 9)).transpose(1, 2),)


@pytest.mark.parametrize("kind", masks.KINDS)
@pytest.mark.parametrize("name", ["cudnn", "unmasked"])
def test_contenders_get_the_same_problem(monkeypatch, name, kind):
    monkeypatch.setattr(contenders, "_aten_varlen", by_varlen)
    monkeypatch.setattr(
        contenders, "_sdpa", lambda *qkv_and_causal: by_sdpa(*qkv_and_causal[:3], is_causal=True)
    )
    monkeypatch.setattr(contenders, "cudnn_version", lambda: "9.19")
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", by_window)
    (contender,) = contenders.contenders([name])
    shape = shape_of(kind)
    if not contender.has(shape, "bf16", "backward"):
        assert name == "unmasked" and kind in (masks.PREFIX, masks.SLOPES)
        return
    *qkv, do = make_inputs(shape, "bf16")
    mask = masks.make_mask(shape, qkv[0])
    leaves = [t.detach().requires_grad_() for t in qkv]
    out = contender.masked(*leaves, mask)
    gradients = torch.autograd.grad(out, leaves, do)
    check(shape, "bf16", (out.detach(), *gradients), truth(shape, [*qkv, do], mask))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", masks.KINDS)
def test_flex_attention_gets_it_too(monkeypatch, kind):
    """Without compiling, and on the CPU, where it has no backward."""
    compile_ = torch.compile  # flex_attention calls it, too
    monkeypatch.setattr(
        torch,
        "compile",
        lambda one, **options: one if "dynamic" in options else compile_(one, **options),
    )
    (contender,) = contenders.contenders(["flex"])
    shape = shape_of(kind)
    inputs = make_inputs(shape, "bf16")
    mask = masks.make_mask(shape, inputs[0])
    out = contender.masked(*inputs[:3], mask)
    check(shape, "bf16", (out,), [of_corner[:1] for of_corner in truth(shape, inputs, mask)])


def test_a_wrong_mask_is_found():
    shape = shape_of(masks.WINDOW)
    inputs = make_inputs(shape, "bf16")
    mask = masks.make_mask(shape_of(masks.CAUSAL), inputs[0])
    out = by_sdpa(*inputs[:3], attn_mask=mask.bias)
    expected = truth(shape, inputs, masks.make_mask(shape, inputs[0]))
    with pytest.raises(RuntimeError, match="wrong: relative error"):
        check(shape, "bf16", (out,), [of_corner[:1] for of_corner in expected])


def test_the_grid_runs_its_own_contenders():
    grid = GRIDS["masks"]
    assert set(grid.contenders) < set(contenders.KNOWN) and "flex" not in grid.contenders
    assert {shape.mask for shape in grid.shapes} == set(masks.KINDS)
    grouped = next(shape for shape in grid.shapes if shape.heads != shape.heads_kv)
    by_name = {one.name: one for one in contenders.contenders(["ours", "stock", "efficient"])}
    assert by_name["ours"].has(grouped, "bf16", "backward")
    assert not by_name["efficient"].has(grouped, "bf16", "forward")
    assert not by_name["stock"].has(grouped, "bf16", "forward")
