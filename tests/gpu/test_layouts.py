"""Inputs as users lay them out, and outputs laid out as the meta functions promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calls import flash_backward, flash_forward, sdpa_backward, sdpa_forward
from cases import DEVICE, HEAD_DIMS, Inputs, Problem, dense, make_inputs, poison, varlen
from compare import assert_matches_reference
from layouts import BATCH, DIM, HEADS, SEQLEN, cut_from, expanded, offset, permuted
from reference import Result
from torch._subclasses.fake_tensor import FakeTensorMode

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "bhsd": permuted(BATCH, HEADS, SEQLEN, DIM),
    "sbhd": permuted(SEQLEN, BATCH, HEADS, DIM),
    "hsbd": permuted(HEADS, SEQLEN, BATCH, DIM),
    "slice_of_heads": cut_from(HEADS, 3, 2),
    "slice_of_rows": cut_from(SEQLEN, 5, 7),
    "slice_of_dim": cut_from(DIM, 8, 16),
    "slice_of_batch": cut_from(BATCH, 1, 1),
    "offset_16_bytes": offset(8),
}
UNALIGNED = {
    "offset_2_bytes": offset(1),
    "offset_8_bytes": offset(4),
    "row_stride_odd": cut_from(DIM, 0, 1),
    "row_stride_8_bytes": cut_from(DIM, 0, 4),
    "dim_last_strided": permuted(BATCH, SEQLEN, DIM, HEADS),
}


def run(problem: Problem, inputs: Inputs) -> Result:
    poison(inputs)
    forward = flash_forward(problem, inputs)
    poison(inputs)
    return Result(*forward[:2], *flash_backward(problem, inputs, forward))


def check(problem: Problem, inputs: Inputs) -> None:
    assert_matches_reference(problem, inputs, run(problem, inputs))


@pytest.mark.usefixtures("strict")
class TestAddressable:
    """What TMA can address runs on our kernels as it is."""

    @pytest.mark.parametrize("head_dim", (*HEAD_DIMS, 72))
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_dense(self, layout, head_dim):
        problem = dense(129, 203, batch=3, head_dim=head_dim, heads=4, heads_kv=2, is_causal=True)
        inputs = make_inputs(problem)
        q, k, v, do = (LAYOUTS[layout](t) for t in (inputs.q, inputs.k, inputs.v, inputs.do))
        check(problem, Inputs(q, k, v, do))

    def test_each_input_in_its_own_layout(self):
        problem = dense(129, 203, batch=3, heads=4, heads_kv=2)
        inputs = make_inputs(problem)
        q, k = LAYOUTS["bhsd"](inputs.q), LAYOUTS["sbhd"](inputs.k)
        v, do = LAYOUTS["slice_of_heads"](inputs.v), LAYOUTS["slice_of_dim"](inputs.do)
        check(problem, Inputs(q, k, v, do))

    def test_packed_qkv(self):
        problem = dense(239, 239, is_causal=True)
        packed = torch.randn(2, 239, 3, 4, 128, dtype=problem.dtype, device=DEVICE)
        q, k, v = packed.unbind(2)
        check(problem, Inputs(q, k, v, torch.randn_like(q)))

    @pytest.mark.parametrize(
        "dims",
        [(HEADS,), (BATCH,), (BATCH, HEADS), (SEQLEN,)],
        ids=["heads", "batch", "batch_heads", "rows"],
    )
    def test_expanded_keys_and_values(self, dims):
        problem = dense(129, 203, batch=3)
        inputs = make_inputs(problem)
        layout = expanded(*dims)
        check(problem, replace(inputs, k=layout(inputs.k), v=layout(inputs.v)))

    def test_expanded_queries(self):
        problem = dense(129, 203, batch=3)
        inputs = make_inputs(problem)
        check(problem, replace(inputs, q=expanded(BATCH)(inputs.q)))

    @pytest.mark.parametrize("stride", (1, 3, 7777, 2**40 + 1))
    @pytest.mark.parametrize("dim", (BATCH, SEQLEN, HEADS), ids=("batch", "rows", "heads"))
    def test_stride_of_a_size_1_dim_means_nothing(self, dim, stride):
        sizes = {"batch": 2, "seqlen_q": 129, "seqlen_k": 129, "heads": 2, "heads_kv": 2}
        for name in {
            BATCH: ("batch",),
            SEQLEN: ("seqlen_q", "seqlen_k"),
            HEADS: ("heads", "heads_kv"),
        }[dim]:
            sizes[name] = 1
        problem = dense(**sizes)
        inputs = make_inputs(problem)

        def odd(t):
            strides = list(t.stride())
            strides[dim] = stride
            return t.as_strided(t.shape, strides)

        check(problem, Inputs(*(odd(t) for t in (inputs.q, inputs.k, inputs.v, inputs.do))))

    @pytest.mark.parametrize("layout", ("packed", "hsd", "slice_of_rows", "slice_of_dim"))
    def test_varlen(self, layout):
        problem = varlen((67, 1, 130), (67, 80, 200), is_causal=True)
        inputs = make_inputs(problem)
        if layout == "packed":
            problem = replace(problem, seqlens_k=problem.seqlens_q)
            packed = torch.randn(
                sum(problem.seqlens_q), 3, 4, 128, dtype=problem.dtype, device=DEVICE
            )
            q, k, v = packed.unbind(1)
            inputs = replace(inputs, q=q, k=k, v=v, cu_seqlens_k=inputs.cu_seqlens_q)
        else:
            change = {
                "hsd": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
                "slice_of_rows": cut_from(0, 5, 7),
                "slice_of_dim": cut_from(2, 8, 16),
            }[layout]
            inputs = replace(
                inputs, **{name: change(getattr(inputs, name)) for name in ("q", "k", "v", "do")}
            )
        check(problem, inputs)

    @pytest.mark.parametrize(
        "grad", ("scalar", "row", "bhsd", "slice", "offset_2_bytes", "dim_last_strided")
    )
    def test_any_grad_out(self, grad):
        """`out.sum().backward()` sends a scalar expanded to out's shape; other graphs send other
        things."""
        problem = dense(129, 203, is_causal=True)
        inputs = make_inputs(problem)
        do = {
            "scalar": lambda t: torch.ones((), dtype=t.dtype, device=t.device).expand(t.shape),
            "row": lambda t: torch.randn(problem.head_dim, dtype=t.dtype, device=t.device).expand(
                t.shape
            ),
            "bhsd": LAYOUTS["bhsd"],
            "slice": LAYOUTS["slice_of_dim"],
            "offset_2_bytes": UNALIGNED["offset_2_bytes"],
            "dim_last_strided": UNALIGNED["dim_last_strided"],
        }[grad](inputs.do)
        check(problem, replace(inputs, do=do))

    def test_chunks_of_out_and_grad_out(self):
        """Context parallel hands the backward views of half the rows of q, out and grad_out, and
        the lse that belongs to them."""
        whole, half = dense(258, 203), dense(129, 203)
        inputs = make_inputs(whole)
        out, lse, *rest = flash_forward(whole, inputs)
        rows = slice(129, 258)
        part = replace(inputs, q=inputs.q[:, rows], do=inputs.do[:, rows])
        gradients = flash_backward(half, part, (out[:, rows], lse[:, :, rows], *rest))
        assert_matches_reference(half, part, Result(out[:, rows], lse[:, :, rows], *gradients))


@pytest.mark.parametrize("which", ("q", "k", "v", "all"))
@pytest.mark.parametrize("layout", UNALIGNED)
def test_what_tma_cannot_address(layout, which):
    """It is copied first. A last dimension that is not contiguous is refused, as by stock."""
    import fa4_ext

    problem = dense(129, 203, batch=3, heads=4, heads_kv=2)
    inputs = make_inputs(problem)
    names = ("q", "k", "v") if which == "all" else (which,)
    inputs = replace(inputs, **{name: UNALIGNED[layout](getattr(inputs, name)) for name in names})
    with fa4_ext.register(fallback="error", speed_rules=False):
        if layout == "dim_last_strided":
            with pytest.raises(RuntimeError, match="must have a contiguous last dimension"):
                run(problem, inputs)
        else:
            check(problem, inputs)


def test_inputs_that_overlap_themselves_are_left_to_stock():
    """PyTorch promises results in the order of the input's strides, which puts the last dimension
    of such an input further out."""
    import fa4_ext

    # The dimensions are [batch, seqlen, heads, head_dim].
    q = torch.randn(1, 4, 95, dtype=torch.bfloat16, device=DEVICE).unfold(-1, 64, 1)
    call = torch.ops.aten._flash_attention_forward
    with (
        fa4_ext.register(fallback="error", speed_rules=False),
        pytest.raises(RuntimeError, match="must not overlap themselves"),
    ):
        call(q, q, q, None, None, 4, 4, 0.0, False, False)


def _description(value):
    if not isinstance(value, torch.Tensor):
        return value
    return tuple(value.shape), value.stride(), value.dtype, value.device.type


META_LAYOUTS = LAYOUTS | {"expanded_heads": expanded(HEADS), "expanded_batch": expanded(BATCH)}


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("op", ("flash", "sdpa"))
@pytest.mark.parametrize("layout", META_LAYOUTS)
def test_outputs_are_what_meta_promises(layout, op):
    """Inductor asserts sizes, strides and dtypes of every output."""
    forward_op, backward_op = {
        "flash": (flash_forward, flash_backward),
        "sdpa": (sdpa_forward, sdpa_backward),
    }[op]
    problem = dense(129, 203, batch=3, heads=4, heads_kv=2)
    inputs = make_inputs(problem)
    inputs = Inputs(*(META_LAYOUTS[layout](t) for t in (inputs.q, inputs.k, inputs.v, inputs.do)))
    forward = forward_op(problem, inputs)
    backward = backward_op(problem, inputs, forward)
    with FakeTensorMode() as mode:
        fake = Inputs(*(mode.from_tensor(t) for t in (inputs.q, inputs.k, inputs.v, inputs.do)))
        fake_forward = forward_op(problem, fake)
        fake_backward = backward_op(problem, fake, fake_forward)
    assert [_description(t) for t in backward] == [_description(t) for t in fake_backward]
    assert [_description(t) for t in forward] == [_description(t) for t in fake_forward]


@pytest.mark.usefixtures("strict")
def test_varlen_outputs_are_what_meta_promises():
    problem = varlen((67, 1, 130), (67, 80, 200), heads=4, heads_kv=2)
    inputs = make_inputs(problem)
    forward = flash_forward(problem, inputs)
    backward = flash_backward(problem, inputs, forward)
    with FakeTensorMode() as mode:
        fake = Inputs(
            *(
                mode.from_tensor(getattr(inputs, name))
                for name in ("q", "k", "v", "do", "cu_seqlens_q", "cu_seqlens_k")
            )
        )
        fake_forward = flash_forward(problem, fake)
        fake_backward = flash_backward(problem, fake, fake_forward)
    assert [_description(t) for t in backward] == [_description(t) for t in fake_backward]
    assert [_description(t) for t in forward] == [_description(t) for t in fake_forward]
