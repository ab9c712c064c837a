"""attn_mask: biases of every kind, form and layout, through the cuDNN op that PyTorch takes them to
and through F.scaled_dot_product_attention.

What a bias hides is not tested with NaN in the hidden keys and values. Plain math multiplies such a
value by a weight of zero, which is NaN, and our kernels do the same where they read it, but they
leave out whole tiles. So neither has to give a certain result.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import biases
import pytest
import torch
import torch.nn.functional as F
from calls import cudnn_backward, cudnn_forward, explained, run_autograd, run_cudnn_op
from cases import BLACKWELL, DEVICE, DTYPES, HEADS, Inputs, Problem, dense, make_inputs
from compare import GRADIENT_FLOOR, assert_close, assert_lse, assert_matches_reference
from graphs import capture
from profiling import kernels_of, providers_of
from reference import Result, compute
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa4_ext

pytestmark = pytest.mark.skipif(BLACKWELL, reason="only Hopper has kernels with a bias")

GRADIENTS = ("dq", "dk", "dv")
BOOLEAN = [name for name, kind in biases.KINDS.items() if kind.is_mask]
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
# Queries and keys: in and around tiles of 64 and 128, fewer of one than of the other.
LENGTHS = (
    (128, 128), (320, 320), (256, 448), (1, 300), (5, 700), (64, 65), (63, 1), (129, 1024),
    (203, 64), (1024, 129), (65, 383), (700, 2), (191, 576),
)  # fmt: skip
GROUPED = {"heads": 4, "heads_kv": 2}


def check_op(problem: Problem, inputs: Inputs | None = None) -> None:
    inputs = inputs or make_inputs(problem)
    assert_matches_reference(problem, inputs, run_cudnn_op(problem, inputs, backward=True))


def heads_first(x: Inputs, *, requires_grad: bool = False) -> list[torch.Tensor]:
    return [t.detach().transpose(1, 2).requires_grad_(requires_grad) for t in (x.q, x.k, x.v)]


def as_bool(x: Inputs) -> Inputs:
    """The inputs with a bool mask for the bias: what is seen."""
    return replace(x, bias=x.bias == 0)


def filled(x: Inputs) -> Inputs:
    """The inputs with the bias that PyTorch makes of a bool mask for the cuDNN op."""
    return replace(x, bias=x.bias.masked_fill(x.bias.isneginf(), biases.FILL))


def runs_ours(problem: Problem, x: Inputs, *, backward: bool) -> bool:
    """Whether F.scaled_dot_product_attention with this mask runs on our kernels."""
    return fa4_ext.explain(
        *heads_first(x),
        attn_mask=x.bias,
        enable_gqa=problem.heads != problem.heads_kv,
        backward=backward,
    ).supported


@pytest.mark.usefixtures("strict")
class TestOp:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", biases.KINDS)
    @pytest.mark.parametrize("lengths", ((333, 333), (200, 461), (461, 200)), ids=str)
    def test_kinds(self, kind, dtype, lengths):
        check_op(dense(*lengths, bias=kind, dtype=DTYPES[dtype], **GROUPED))

    @pytest.mark.parametrize("kind", ("normal", "rows_without_keys", "filled_rows"))
    @pytest.mark.parametrize("form", biases.FORMS)
    @pytest.mark.parametrize("heads", HEADS)
    def test_forms(self, form, heads, kind):
        query, key = HEADS[heads]
        check_op(dense(200, 330, bias=kind, bias_form=form, heads=query, heads_kv=key))

    @pytest.mark.parametrize("form", ("", "queries_keys", "batch_keys"))
    @pytest.mark.parametrize("layout", (*biases.LAYOUTS, biases.EXPANDED))
    @pytest.mark.parametrize("keys", (331, 332, 384))
    def test_layouts(self, layout, keys, form):
        """Some lie so that the kernels read them in place, others are copied."""
        check_op(dense(200, keys, bias="normal", bias_form=form, bias_layout=layout, **GROUPED))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ("normal", "documents", "filled_rows", "blocks"))
    @pytest.mark.parametrize("head_dims", (*HEAD_DIMS, (72, 40), (136, 96), (64, 200)), ids=str)
    def test_head_dims(self, head_dims, kind, dtype):
        head_dim, head_dim_v = head_dims
        check_op(
            dense(
                333, 461, head_dim=head_dim, head_dim_v=head_dim_v, bias=kind, dtype=DTYPES[dtype],
                heads=2, heads_kv=1,
            )
        )  # fmt: skip

    @pytest.mark.parametrize("kind", ("blocks", "normal", "lowest_left_padded_causal", "one_key"))
    @pytest.mark.parametrize("lengths", LENGTHS, ids=str)
    @pytest.mark.parametrize("head_dim", (64, 128, 256))
    def test_lengths(self, head_dim, lengths, kind):
        check_op(dense(*lengths, head_dim=head_dim, bias=kind, **GROUPED))

    def test_many_tiles(self):
        """A list has more tiles than a warp has lanes."""
        check_op(dense(300, 9000, batch=1, heads=2, heads_kv=1, bias="blocks"))
        check_op(dense(9000, 300, batch=1, heads=2, heads_kv=1, bias="blocks"))

    @pytest.mark.parametrize("kind", ("blocks", "window"))
    def test_more_tiles_than_multiprocessors(self, kind):
        check_op(dense(1000, 1000, batch=3, heads=16, heads_kv=4, bias=kind))

    @pytest.mark.parametrize("scale", (0.01, 1.0))
    def test_scales(self, scale):
        problem = dense(200, 300, bias="normal", scale=scale, **GROUPED)
        check_op(problem)
        check_op(replace(problem, bias="filled_rows"))

    @pytest.mark.parametrize("kind", ("blocks", "normal", "filled_rows"))
    @pytest.mark.parametrize("head_dim", (64, 128, 256))
    def test_the_same_bits_again(self, head_dim, kind):
        """The backward adds up in one order always, whether it is asked to or not."""
        problem = dense(700, 700, head_dim=head_dim, bias=kind, heads=8, heads_kv=2)
        inputs = make_inputs(problem)
        first, second = (run_cudnn_op(problem, inputs, backward=True) for _ in range(2))
        for name, value in vars(first).items():
            assert torch.equal(value, getattr(second, name)), name


@pytest.mark.usefixtures("strict")
class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", (64, 128, 256))
    def test_a_row_that_is_low_throughout(self, head_dim, dtype):
        """Adding the same to all keys of a row changes its logsumexp alone, here to -1000."""
        plain = dense(300, 333, head_dim=head_dim, dtype=DTYPES[dtype], **GROUPED)
        inputs = make_inputs(plain)
        bias = torch.full((1, 1, 300, 1), -1000.0, dtype=plain.dtype, device=DEVICE)
        bias[:, :, ::3] = 0
        low = replace(inputs, bias=bias)
        result = run_cudnn_op(plain, low, backward=True)
        assert_lse(result.lse, compute(plain, low, torch.float32, backward=False).lse)
        assert_matches_reference(plain, inputs, result, check_lse=False)

    @pytest.mark.parametrize("head_dim", (64, 128, 256))
    def test_a_bias_that_hides_nothing_gives_the_bits_of_a_call_without(self, head_dim):
        problem = dense(512, 768, head_dim=head_dim, bias="nothing", **GROUPED)
        inputs = make_inputs(problem)
        plain = replace(inputs, bias=None)
        tiles = [explained(problem, x)[1].rpartition("_")[2] for x in (inputs, plain)]
        if tiles[0] != tiles[1]:
            pytest.skip(f"the tiles differ: {tiles}")
        with_bias, without = (run_cudnn_op(problem, x, backward=False) for x in (inputs, plain))
        for name in ("out", "lse"):
            assert torch.equal(getattr(with_bias, name), getattr(without, name)), name

    @pytest.mark.parametrize("value", ("nan", "inf"))
    @pytest.mark.parametrize("key", (0, 70, 332))
    def test_a_row_of_a_bias_with_nan_is_nan(self, value, key):
        """So is one with +inf: its softmax is inf - inf. All other rows are right."""
        problem = dense(200, 333, bias="normal", **GROUPED)
        inputs = make_inputs(problem)
        wrong = torch.zeros(2, 4, 200, dtype=torch.bool, device=DEVICE)
        wrong[0, 1, 5] = wrong[1, 0, 130] = True
        inputs.bias[..., key].masked_fill_(wrong, float(value))
        result = run_cudnn_op(problem, inputs, backward=True)
        truth, plain = (
            compute(problem, inputs, dtype, backward=True)
            for dtype in (torch.float32, problem.dtype)
        )
        rows = wrong.transpose(1, 2)
        assert result.out[rows].isnan().all() and result.dq[rows].isnan().all()
        assert not result.lse[wrong].isfinite().any()
        assert_lse(result.lse.masked_fill(wrong, 0), truth.lse.masked_fill(wrong, 0))
        # The key gets NaN of its row, in plain math the others of its head do, too.
        for name in ("out", *GRADIENTS):
            ours, same_precision, exact = (getattr(r, name) for r in (result, plain, truth))
            where = rows[..., None] if name in ("out", "dq") else exact.isnan()
            assert not (ours.isnan() & ~where).any(), name
            if name in ("dk", "dv"):
                assert torch.equal(ours[:, key].isnan(), exact[:, key].isnan()), name
            else:
                assert torch.equal(ours.isnan(), where.expand_as(ours)), name
            tensors = (t.masked_fill(where, 0) for t in (ours, same_precision, exact))
            assert_close(name, *tensors, GRADIENT_FLOOR if name in GRADIENTS else 0)

    def test_rows_without_keys_give_zeros(self):
        problem = dense(300, 300, bias="rows_without_keys", **GROUPED)
        inputs = make_inputs(problem)
        expected = run_cudnn_op(problem, inputs, backward=True)
        without = inputs.bias.isneginf().all(dim=-1)
        assert torch.equal(expected.lse.isneginf(), without)
        rows = without.transpose(1, 2)
        for name in ("out", "dq"):
            assert not getattr(expected, name)[rows].any(), name

    @pytest.mark.parametrize("fill", (-1e9, torch.finfo(torch.bfloat16).min))
    def test_rows_that_a_finite_bias_hides_are_uniform(self, fill):
        """Below -2^20 such rows have no gradients."""
        problem = dense(300, 333, heads=2, heads_kv=2)
        inputs = make_inputs(problem)
        inputs.bias = torch.zeros(300, 333, dtype=problem.dtype, device=DEVICE)
        inputs.bias[40:200] = fill
        result = run_cudnn_op(problem, inputs, backward=True)
        uniform = inputs.v.float().mean(dim=1, keepdim=True).expand_as(result.out)
        torch.testing.assert_close(
            result.out[:, 40:200].float(), uniform[:, 40:200], atol=2e-3, rtol=1e-2
        )
        assert not result.dq[:, 40:200].any()
        assert_matches_reference(problem, inputs, result)


@pytest.mark.usefixtures("strict")
class TestFunction:
    """F.scaled_dot_product_attention, as users call it."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", biases.KINDS)
    def test_float_masks(self, kind, dtype):
        problem = dense(333, 461, bias=kind, dtype=DTYPES[dtype], **GROUPED)
        inputs = make_inputs(problem)
        assert runs_ours(problem, inputs, backward=False) and runs_ours(
            problem, inputs, backward=True
        )
        result = run_autograd(problem, inputs, backward=True, backend=None)
        assert_matches_reference(problem, inputs, result, check_lse=False)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", BOOLEAN)
    def test_bool_masks(self, kind, dtype):
        problem = dense(333, 461, bias=kind, dtype=DTYPES[dtype], **GROUPED)
        inputs = make_inputs(problem)
        given = as_bool(inputs)
        assert runs_ours(problem, given, backward=True)
        result = run_autograd(problem, given, backward=True, backend=None)
        assert_matches_reference(problem, filled(inputs), result, check_lse=False)

    @pytest.mark.parametrize("kind", ("causal", "padding_left", "normal", "holes"))
    @pytest.mark.parametrize("layout", (*biases.LAYOUTS, biases.EXPANDED))
    @pytest.mark.parametrize("keys", (333, 334, 336))
    def test_layouts(self, layout, kind, keys):
        """Those whose keys do not lie next to each other go to other kernels. With an odd number of
        keys a mask is copied, else read where it lies, as is best for its alignment."""
        problem = dense(200, keys, bias=kind, bias_layout=layout, **GROUPED)
        inputs = make_inputs(problem)
        assert runs_ours(problem, inputs, backward=True) == (inputs.bias.stride(-1) == 1)
        result = run_autograd(problem, inputs, backward=True, backend=None)
        assert_matches_reference(problem, inputs, result, check_lse=False)

    @pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
    def test_head_dims(self, head_dims):
        head_dim, head_dim_v = head_dims
        problem = dense(
            300, 400, head_dim=head_dim, head_dim_v=head_dim_v, bias="documents", **GROUPED
        )
        inputs = make_inputs(problem)
        result = run_autograd(problem, inputs, backward=True, backend=None)
        assert_matches_reference(problem, inputs, result, check_lse=False)

    @pytest.mark.parametrize("boolean", (False, True), ids=("float", "bool"))
    @pytest.mark.parametrize("shape", ((512, 512), (1, 512, 512), (2, 1, 1, 512), (1, 4, 512, 512)))
    def test_who_runs(self, shape, boolean):
        """What explain says is what the profiler sees. PyTorch takes masks of three dimensions to
        the memory-efficient op."""
        problem = dense(512, 512)
        inputs = make_inputs(problem)
        mask = torch.rand(shape, device=DEVICE) < 0.7
        inputs.bias = (
            mask if boolean else torch.zeros(shape, device=DEVICE).masked_fill(~mask, -9.0)
        )
        inputs.bias = inputs.bias if boolean else inputs.bias.to(problem.dtype)
        found = providers_of(lambda: run_autograd(problem, inputs, backward=True, backend=None))
        expected = runs_ours(problem, inputs, backward=True)
        assert expected and found - {"other"} == {"ours"}, found


@pytest.mark.usefixtures("lenient")
class TestByDefault:
    """The same with the speed rules, and what other kernels run."""

    @pytest.mark.parametrize("boolean", (False, True), ids=("float", "bool"))
    @pytest.mark.parametrize("queries", (1, 2, 7, 33, 64))
    def test_few_queries(self, queries, boolean):
        """Whoever runs them."""
        problem = dense(queries, 500, bias="padding_left", **GROUPED)
        inputs = make_inputs(problem)
        given, expected = (as_bool(inputs), filled(inputs)) if boolean else (inputs, inputs)
        result = run_autograd(problem, given, backward=True, backend=None)
        assert_matches_reference(problem, expected, result, check_lse=False)

    @pytest.mark.parametrize("form", ("queries_keys", "batch", "batch_heads_keys", "heads", "all"))
    def test_a_bias_by_head_is_left_to_cudnn(self, form):
        """cuDNN is faster there, if queries have rows of their own, too."""
        problem = dense(1024, 1024, bias="holes", bias_form=form)
        inputs = make_inputs(problem)
        ours = form not in ("heads", "all")
        assert runs_ours(problem, inputs, backward=True) == ours
        found = providers_of(lambda: run_autograd(problem, inputs, backward=True, backend=None))
        assert ("ours" in found, "cudnn" in found) == (ours, not ours), found

    def test_a_mask_that_requires_a_gradient_gets_one(self):
        problem = dense(128, 256, bias="normal")
        inputs = make_inputs(problem)
        mask = inputs.bias.requires_grad_()
        q, k, v = heads_first(inputs)
        q.requires_grad_()  # else PyTorch's forward leaves out what its backward reads
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), mask)
        assert gradient.abs().max() > 0 and gradient.isfinite().all()

    def test_choosing_cudnn_means_cudnn(self):
        inputs = make_inputs(dense(512, 512, bias="normal"))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            found = providers_of(
                lambda: F.scaled_dot_product_attention(*heads_first(inputs), attn_mask=inputs.bias)
            )
        assert "ours" not in found and "cudnn" in found, found

    def test_dropout_is_left_to_others(self):
        inputs = make_inputs(dense(512, 512, bias="normal"))
        found = providers_of(
            lambda: F.scaled_dot_product_attention(
                *heads_first(inputs), attn_mask=inputs.bias, dropout_p=0.2
            )
        )
        assert "ours" not in found, found


def test_either_half_may_be_cudnns():
    """cuDNN's backward reads our logsumexp as its own, and the other way round."""
    problem = dense(300, 304, bias="normal")
    inputs = make_inputs(problem)
    with fa4_ext.register(fallback="error", speed_rules=False):
        ours = cudnn_forward(problem, inputs)
    cudnns = cudnn_forward(problem, inputs)
    stock = cudnn_backward(problem, inputs, cudnns)
    mixed = {"ours, cudnn": cudnn_backward(problem, inputs, ours)}
    with fa4_ext.register(fallback="error", speed_rules=False):
        # Its seed says that cuDNN ran the forward.
        mixed["cudnn, cudnn"] = cudnn_backward(problem, inputs, cudnns)
        seed = torch.zeros(3, dtype=torch.int64, device=DEVICE)[2]
        mixed["cudnn, ours"] = cudnn_backward(problem, inputs, (*cudnns[:6], seed, *cudnns[7:]))
    for (name, gradients), (i, gradient) in itertools.product(mixed.items(), enumerate("qkv")):
        error = (gradients[i] - stock[i]).float().norm() / stock[i].float().norm()
        assert error < 2e-2, f"{name}: d{gradient} differs by {error:.1e}"


def masked(problem: Problem, x: Inputs, *, boolean: bool):
    """Returns the tensors, a mask, and the truth's inputs."""
    given, expected = (as_bool(x), filled(x)) if boolean else (x, x)
    return heads_first(x, requires_grad=True), given.bias, expected


def check_autograd(problem: Problem, x: Inputs, out: torch.Tensor, tensors) -> None:
    gradients = torch.autograd.grad(out, tensors, x.do.transpose(1, 2))
    out, *gradients = (t.detach().transpose(1, 2) for t in (out, *gradients))
    assert_matches_reference(problem, x, Result(out, None, *gradients), check_lse=False)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("boolean", (False, True), ids=("float", "bool"))
class TestAround:
    PROBLEM = dense(300, 333, bias="documents", heads=4, heads_kv=4)

    def test_compiled(self, boolean):
        attend = torch.compile(F.scaled_dot_product_attention, fullgraph=True)
        x = make_inputs(self.PROBLEM)
        tensors, mask, expected = masked(self.PROBLEM, x, boolean=boolean)
        check_autograd(self.PROBLEM, expected, attend(*tensors, attn_mask=mask), tensors)
        found = providers_of(lambda: attend(*tensors, attn_mask=mask))
        assert "ours" in found and "cudnn" not in found, found

    @pytest.mark.parametrize("layout", ("contiguous", "row_stride_odd"))
    def test_in_a_graph(self, boolean, layout):
        """The mask that is replayed is what lies there by then: its lists are made anew."""
        problem = replace(self.PROBLEM, bias_layout=layout)
        x = make_inputs(problem)
        tensors, mask, _ = masked(problem, x, boolean=boolean)
        do = x.do.transpose(1, 2)

        def step():
            out = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
            return out, *torch.autograd.grad(out, tensors, do)

        graph, captured = capture(step)
        for kind in ("window", "prefix", "causal"):
            fresh = make_inputs(replace(problem, bias=kind, bias_form="batch"))
            with torch.no_grad():
                for name in ("q", "k", "v", "do"):
                    getattr(x, name).copy_(getattr(fresh, name))
                mask.copy_(as_bool(fresh).bias if boolean else fresh.bias)
            graph.replay()
            out, *gradients = (t.detach().transpose(1, 2) for t in captured)
            expected = filled(fresh) if boolean else fresh
            result = Result(out, None, *gradients)
            assert_matches_reference(problem, expected, result, check_lse=False)

    def test_checkpointed(self, boolean):
        x = make_inputs(self.PROBLEM)
        tensors, mask, expected = masked(self.PROBLEM, x, boolean=boolean)

        def attend(*given):
            return F.scaled_dot_product_attention(*given, attn_mask=mask)

        out = torch.utils.checkpoint.checkpoint(attend, *tensors, use_reentrant=False)
        check_autograd(self.PROBLEM, expected, out, tensors)

    def test_autocast(self, boolean):
        """Tensors of fp32, the mask too, are rounded before."""
        x = make_inputs(self.PROBLEM)
        tensors, mask, _ = masked(self.PROBLEM, x, boolean=boolean)
        wide = [t.detach().float().requires_grad_() for t in tensors]
        mask = mask if boolean else mask.float()

        def attend():
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return F.scaled_dot_product_attention(*wide, attn_mask=mask)

        assert "ours" in providers_of(attend)
        out = F.scaled_dot_product_attention(*tensors, attn_mask=mask if boolean else x.bias)
        assert torch.equal(attend(), out)
        gradients = torch.autograd.grad(attend(), wide, x.do.transpose(1, 2))
        for one, other in zip(
            gradients, torch.autograd.grad(out, tensors, x.do.transpose(1, 2)), strict=True
        ):
            assert torch.equal(one, other.float())


@pytest.mark.usefixtures("strict")
class TestMemory:
    @staticmethod
    def peak(work) -> tuple[int, int]:
        """What `work` allocates at most, and what its results keep."""
        work()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = work()
        kept = torch.cuda.memory_allocated() - before
        most = torch.cuda.max_memory_allocated() - before
        del results
        return most, kept

    @pytest.mark.parametrize("copied", (False, True))
    def test_what_a_call_allocates_above_its_results(self, copied):
        """The lists take little. A bias that the kernels cannot read where it lies is copied, as it
        is before it is broadcast."""
        layout = "offset_2_bytes" if copied else "contiguous"
        problem = dense(2048, 2048, bias="causal", bias_form="one", bias_layout=layout, heads_kv=1)
        inputs = make_inputs(problem)
        copy = inputs.bias.nbytes if copied else 0
        # The allocator may give up to a MiB more than was asked for a large tensor.
        lists = 2**20 if copied else 2**16
        most, kept = self.peak(lambda: cudnn_forward(problem, inputs))
        assert most - kept <= copy + lists, (most, kept)
        forward = cudnn_forward(problem, inputs)
        most, kept = self.peak(lambda: cudnn_backward(problem, inputs, forward))
        delta = forward[1].nbytes
        assert most - kept <= copy + delta + lists, (most, kept)


@pytest.mark.usefixtures("strict")
def test_what_a_call_launches():
    """A call's lists are made for it: once in a forward, twice in a backward."""
    problem = dense(512, 512, bias="causal")
    inputs = make_inputs(problem)
    found = kernels_of(lambda: cudnn_forward(problem, inputs))
    assert sum("map_queries" in name for name in found) == 1, found
    forward = cudnn_forward(problem, inputs)
    found = kernels_of(lambda: cudnn_backward(problem, inputs, forward))
    assert sum("map_queries" in name for name in found) == 1, found
    assert sum("map_keys" in name for name in found) == 1, found
