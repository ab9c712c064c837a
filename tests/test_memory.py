"""The memory benchmark without a GPU: its check of long contexts, what it counts as returned, and
its rows and table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import memory
from fa4_ext.bench.contenders import Contender
from fa4_ext.bench.correctness import MAX_RELATIVE_ERROR
from fa4_ext.bench.shapes import Shape, square

SELF = square(2, 4, 40, 16, True, heads_kv=2, name="self")
DECODE = Shape(2, 4, 2, 1, 50, 16, False, name="decode")


def attend(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def broken(q, k, v, causal):
    raise RuntimeError("out of order")


def inputs_of(shape: Shape, _dtype: str = "") -> list[torch.Tensor]:
    rows = [
        (shape.seqlen_q, shape.heads),
        (shape.seqlen_k, shape.heads_kv),
        (shape.seqlen_k, shape.heads_kv),
    ]
    return [
        torch.randn(shape.batch, n, heads, shape.head_dim).transpose(1, 2)
        for n, heads in (*rows, rows[0])
    ]


@pytest.fixture
def measure(monkeypatch):
    """Returns rows of named functions on the CPU, each call of which takes 5 MiB."""
    torch.manual_seed(0)
    monkeypatch.setattr(memory, "make_inputs", inputs_of)
    monkeypatch.setattr(memory, "peak", lambda call: (call(), 5 << 20))

    def measure(shapes: tuple[Shape, ...], **functions) -> list[dict]:
        return memory.measure(
            [Contender(name, name, "1", function, None) for name, function in functions.items()],
            shapes,
        )

    return measure


@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize("wrong", [None, 0, 1, 2, 3])
def test_last_rows_are_held_to_fp32(monkeypatch, rows, wrong):
    monkeypatch.setattr(memory, "LAST_ROWS", rows)
    torch.manual_seed(0)
    *qkv, do = inputs = inputs_of(SELF)
    leaves = [t.clone().requires_grad_() for t in qkv]
    out = attend(*leaves, causal=True)
    outputs = [out.detach(), *torch.autograd.grad(out, leaves, do)]
    if wrong is None:
        assert memory.error_of_last_rows(SELF, inputs, outputs) < 1e-5
    else:
        outputs[wrong] = 1.05 * outputs[wrong]
        assert memory.error_of_last_rows(SELF, inputs, outputs) > MAX_RELATIVE_ERROR["bf16"]


@pytest.mark.parametrize("shape", [SELF, DECODE], ids=lambda shape: shape.name)
def test_returned_bytes_are_those_of_torch_s_own_results(shape):
    q, k, v, _ = (t.to("meta", torch.bfloat16) for t in inputs_of(shape))
    k, v = (t.repeat_interleave(shape.heads // shape.heads_kv, 1) for t in (k, v))
    out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    assert memory.returned_bytes(shape, "forward") == out.nbytes + logsumexp.nbytes
    assert memory.returned_bytes(shape, "backward") == sum(
        2 * t.numel() for t in inputs_of(shape)[:3]
    )


def test_a_contender_that_fails_has_an_error_and_the_others_their_bytes(measure, capsys):
    rows = measure((SELF, DECODE), ours=attend, stock=broken)
    assert [row["name"] for row in rows] == ["self forward", "self backward", "decode forward"]
    for row in rows:
        assert row["results"]["ours"] == {"peak_bytes": 5 << 20}, row
        assert "out of order" in row["results"]["stock"]["error"], row
    assert capsys.readouterr().err.count("stock, self: out of order") == 1


def test_a_long_context_is_checked(measure, monkeypatch):
    monkeypatch.setattr(memory, "LONG", 40)
    rows = measure(
        (SELF,), ours=attend, stock=lambda q, k, v, causal: 1.05 * attend(q, k, v, causal)
    )
    for row in rows:
        assert row["results"]["ours"]["relative_error"] < 1e-5, row
        assert "wrong: relative error" in row["results"]["stock"]["error"], row


def test_the_table_says_bytes_and_the_largest_part(measure):
    rows = measure((SELF, replace(DECODE, name="other")), ours=attend, stock=attend, fa4=broken)
    rows[1]["results"]["ours"] = {"peak_bytes": 6 << 20}
    lines = memory.text(rows, ["ours", "stock", "fa4"]).splitlines()
    assert lines[0].split() == ["MiB", "at", "most", "returned", "ours", "stock", "fa4"]
    assert lines[2].split()[-3:] == ["6.0", "5.0", "failed"]
    assert lines[-1] == "ours takes at most 1.200 of stock's (self backward)"


def test_the_shapes_are_ones_that_the_kernels_can_run():
    assert len({shape.name for shape in memory.SHAPES}) == len(memory.SHAPES)
    for shape in memory.SHAPES:
        assert shape.head_dim % 8 == 0 and shape.heads % shape.heads_kv == 0, shape
        assert not shape.lengths or sum(shape.lengths) == 16384, shape
        assert shape.longest < memory.LONG or (shape.causal and not shape.lengths), (
            f"{shape} can't be checked"
        )
