"""What PyTorch and its users rely on around the numbers: who runs which call, what comes back, what
stays as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from calls import (
    aten,
    deterministic,
    flash_backward,
    flash_forward,
    flash_forward_into,
    run_autograd,
    sdpa_forward,
)
from cases import DEVICE, HEADS, Inputs, dense, make_inputs, varlen
from compare import assert_matches_reference
from fresh_process import run_script
from profiling import kernels_of, provider, providers_of
from reference import Result
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa4_ext

# It is long enough that no speed rule sends it to stock.
LONG = dict(batch=2, heads=8, heads_kv=8, is_causal=True)


def bhsd(inputs: Inputs):
    return [t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v)]


def requested_bytes(call) -> int:
    """Returns how many bytes of torch's allocator a call holds at most, beyond those that were held
    before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    call()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


@pytest.mark.usefixtures("strict")
class TestOutputs:
    def test_flash_attention_forward(self):
        inputs = make_inputs(problem := dense(129, 203))
        out, lse, rng_state, unused, debug_mask = flash_forward(problem, inputs)
        assert lse.shape == (2, 4, 129) and lse.dtype == torch.float32 and lse.is_contiguous()
        assert rng_state.shape == (2,) and rng_state.dtype == torch.uint64
        assert unused.shape == () and unused.dtype == torch.uint64
        assert debug_mask.shape == (0,) and debug_mask.dtype == problem.dtype
        assert {t.device for t in (out, lse, rng_state, unused, debug_mask)} == {inputs.q.device}

    def test_varlen_lse(self):
        inputs = make_inputs(problem := varlen((67, 130)))
        lse = flash_forward(problem, inputs)[1]
        assert lse.shape == (4, 197) and lse.is_contiguous()

    def test_scaled_dot_product_flash_attention(self):
        inputs = make_inputs(problem := dense(129, 203))
        out, lse, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_mask = sdpa_forward(
            problem, inputs
        )
        assert out.shape == (2, 4, 129, 128) and lse.shape == (2, 4, 129)
        assert cum_seq_q is None and cum_seq_k is None and (max_q, max_k) == (129, 203)
        assert rng_state.shape == (2,) and unused.shape == () and debug_mask.shape == (0,)

    @pytest.mark.parametrize("heads_kv", (8, 2))
    def test_a_call_takes_its_results_and_the_planned_workspace(self, heads_kv):
        problem = dense(500, 500, **LONG | {"heads_kv": heads_kv})
        inputs = make_inputs(problem)
        forward = flash_forward(problem, inputs)
        results = sum(t.nbytes for t in forward)
        assert results <= requested_bytes(lambda: flash_forward(problem, inputs)) <= results + 64
        workspace = fa4_ext.explain(
            *bhsd(inputs), is_causal=True, enable_gqa=True, backward=True
        ).workspace_bytes
        gradients = sum(t.nbytes for t in (inputs.q, inputs.k, inputs.v))
        assert (
            requested_bytes(lambda: flash_backward(problem, inputs, forward))
            == gradients + workspace
        )

    def test_no_other_kernels_run(self):
        """A forward is one launch; a backward ours alone, with at most memsets around them."""
        inputs = make_inputs(problem := dense(512, 512, **LONG))
        forward = flash_forward(problem, inputs)
        assert len(kernels_of(lambda: flash_forward(problem, inputs))) == 1
        names = kernels_of(lambda: flash_backward(problem, inputs, forward))
        assert all(provider(name) == "ours" or "emset" in name for name in names), names


def _calls_and_their_tensors():
    """Returns each op's inputs and results."""
    inputs = make_inputs(problem := dense(129, 203, heads_kv=2))
    forward = flash_forward(problem, inputs)
    given = [inputs.q, inputs.k, inputs.v, inputs.do]
    packed = make_inputs(packed_problem := varlen((67, 130)))
    packed_forward = flash_forward(packed_problem, packed)
    packed_given = [packed.q, packed.k, packed.v, packed.do, packed.cu_seqlens_q]
    calls = {
        "dense": (given, forward),
        "backward": ([*given, *forward], flash_backward(problem, inputs, forward)),
        "varlen": (packed_given, packed_forward),
        "varlen_backward": (
            [*packed_given, *packed_forward],
            flash_backward(packed_problem, packed, packed_forward),
        ),
        "sdpa": (given, [t for t in sdpa_forward(problem, inputs) if isinstance(t, torch.Tensor)]),
    }
    if hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):
        out = torch.empty_like(inputs.q)
        calls["inplace"] = ([*given, out], [flash_forward_into(out, problem, inputs)])
    return calls


@torch.library.custom_op("fa4_ext_tests::attention", mutates_args=())
def wrapped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Wraps the op as xformers does, with all of its results that are not of a debug mask."""
    return aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False
    )[:4]


@wrapped_attention.register_fake
def _(q, k, v):
    batch, seqlen, heads, _ = q.shape
    state, unused = (q.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    return (
        torch.empty_like(q),
        q.new_empty((batch, heads, seqlen), dtype=torch.float32),
        state,
        unused,
    )


@pytest.mark.usefixtures("strict")
class TestMemoryOfResults:
    """The schema promises results that share memory with nothing."""

    def test_every_storage_is_another(self):
        for name, (given, results) in _calls_and_their_tensors().items():
            storages = [t.untyped_storage() for t in (*given, *results)]
            addresses = [storage.data_ptr() for storage in storages if storage.nbytes()]
            assert len({storage._cdata for storage in storages}) == len(storages), name
            assert len(set(addresses)) == len(addresses), name
            # The storage of a dense one holds its tensor and nothing beside it.
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in results), (
                name,
                [t.untyped_storage() for t in results],
            )

    @pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
    def test_a_custom_op_around_the_op(self, compiled):
        inputs = make_inputs(problem := dense(129, 129, is_causal=True))
        attention = (
            torch.compile(wrapped_attention, fullgraph=True) if compiled else wrapped_attention
        )
        out, lse, *_ = attention(inputs.q, inputs.k, inputs.v)
        assert_matches_reference(problem, inputs, Result(out, lse))

    def test_torch_save(self, tmp_path):
        for name, (_, results) in _calls_and_their_tensors().items():
            torch.save(tuple(results), tmp_path / name)
            for saved, result in zip(torch.load(tmp_path / name), results, strict=True):
                assert (saved.shape, saved.dtype, saved.device) == (
                    result.shape,
                    result.dtype,
                    result.device,
                ), name
            assert (tmp_path / name).stat().st_size < sum(t.nbytes for t in results) + 2**16, name

    def test_torchs_check_of_schemas(self):
        inputs = make_inputs(problem := dense(129, 203, heads_kv=2))
        with SchemaCheckMode():
            flash_backward(problem, inputs, flash_forward(problem, inputs))
            sdpa_forward(problem, inputs)


class TestWhoRuns:
    def test_plain_call(self, lenient):
        q, k, v = bhsd(make_inputs(dense(1024, 1024, **LONG)))
        assert providers_of(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)) == {
            "ours"
        }
        lenient.remove()
        assert "ours" not in providers_of(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        )

    def test_plain_call_and_its_backward(self, lenient):
        problem = dense(1024, 1024, **LONG)
        inputs = make_inputs(problem)
        owners = [
            provider(name)
            for name in kernels_of(
                lambda: run_autograd(problem, inputs, backward=True, backend=None)
            )
        ]
        assert owners.count("ours") >= 2 and not {"stock", "cudnn", "efficient"} & set(owners), (
            owners
        )

    def test_without_preference_cudnn_keeps_its_calls(self):
        q, k, v = bhsd(make_inputs(dense(1024, 1024, **LONG)))
        before = kernels_of(lambda: F.scaled_dot_product_attention(q, k, v))
        with fa4_ext.register(prefer=False):
            assert kernels_of(lambda: F.scaled_dot_product_attention(q, k, v)) == before
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                assert providers_of(lambda: F.scaled_dot_product_attention(q, k, v)) == {"ours"}

    @pytest.mark.parametrize(
        "backend",
        (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION),
        ids=lambda b: b.name,
    )
    def test_users_choice_of_backend(self, backend, lenient):
        q, k, v = bhsd(make_inputs(dense(1024, 1024, **LONG)))

        def call():
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, v, is_causal=True)

        with_ours = kernels_of(call)
        lenient.remove()
        assert with_ours == kernels_of(call) and "ours" not in map(provider, with_ours)

    @pytest.mark.parametrize("mask", ("full", "causal"))
    @pytest.mark.parametrize("heads", HEADS)
    def test_explain_agrees(self, heads, mask, strict):
        problem = dense(
            1024, 1024, heads=HEADS[heads][0], heads_kv=HEADS[heads][1], is_causal=mask == "causal"
        )
        q, k, v = bhsd(make_inputs(problem))
        for backward in (False, True):
            told = fa4_ext.explain(
                q, k, v, is_causal=problem.is_causal, enable_gqa=heads != "mha", backward=backward
            )
            assert told.supported and told.kernel in {
                kernel.name for kernel in fa4_ext.kernels()
            }, told.reason
        told = fa4_ext.explain(q, k, v, dropout_p=0.1, enable_gqa=heads != "mha")
        assert not told.supported and "dropout" in told.reason


def _attention(**options):
    """Calls F.sdpa with flash attention alone enabled, so that both registrations ask the same
    op."""

    def call(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def _flash_op(**options):
    def call(q, k, v):
        return flash_forward(
            dense(256, 256), Inputs(*(t.transpose(1, 2) for t in (q, k, v)), do=None), **options
        )

    return call


def _normal(*shape, dtype=torch.bfloat16, device=None):
    return [torch.randn(shape, dtype=dtype, device=device or DEVICE) for _ in range(3)]


LEFT_TO_STOCK = {
    "dropout": (_attention(dropout_p=0.3), dict()),
    "dropout_op": (_flash_op(dropout_p=0.3), dict()),
    "debug_mask": (_flash_op(dropout_p=0.3, return_debug_mask=True), dict()),
    "fp32": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), dict(dtype=torch.float32)),
    "cpu": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        dict(device="cpu"),
    ),
    "attn_mask_by_head": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=q.new_zeros(1, 4, 256, 256)
        ),
        dict(),
    ),
}


@pytest.mark.parametrize("case", LEFT_TO_STOCK)
def test_left_to_stock(case):
    """The results are the same as without a registration, to the bit and with the same random
    state."""
    call, fields = LEFT_TO_STOCK[case]
    fields = dict(head_dim=128, dtype=torch.bfloat16, device=DEVICE) | fields
    inputs = _normal(2, 4, 256, fields["head_dim"], dtype=fields["dtype"], device=fields["device"])

    def run():
        torch.manual_seed(7)
        result = call(*inputs)
        state = torch.cuda.get_rng_state()
        return [
            t
            for t in (result if isinstance(result, tuple) else (result,))
            if t.numel() and t.dtype != torch.uint64
        ], state

    without, state_without = run()
    with fa4_ext.register():
        ours, state_ours = run()
    assert len(ours) == len(without) and all(
        torch.equal(a, b) for a, b in zip(ours, without, strict=True)
    )
    assert torch.equal(state_ours, state_without)


def test_what_stock_refuses_too_raises_its_error():
    """PyTorch builds its kernel without ALiBi."""
    inputs = _normal(2, 4, 256, 128, dtype=torch.bfloat16, device=DEVICE)
    call = _flash_op(alibi_slopes=torch.linspace(0.1, 1, 4, device=DEVICE))
    with pytest.raises(RuntimeError) as without:
        call(*inputs)
    with fa4_ext.register(), pytest.raises(RuntimeError) as ours:
        call(*inputs)
    assert (ours.type, str(ours.value)) == (without.type, str(without.value))


def test_warn_only_warns_once_as_stock_does():
    code = """
        import warnings
        import torch, torch.nn.functional as F
        import fa4_ext
        fa4_ext.register(fallback="error", speed_rules=False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        options = dict(dtype=torch.bfloat16, device="cuda", requires_grad=True)
        q, k, v = (torch.randn(1, 4, 256, 128, **options) for _ in range(3))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                F.scaled_dot_product_attention(q, k, v).sum().backward()
        sentence = "Flash Attention defaults to a non-deterministic algorithm"
        print(sum(sentence in str(warning.message) for warning in caught))
    """
    assert run_script(code, FA4_EXT_AUTOREGISTER="0").split()[-1] == "1"


def test_dropout_trains_through_stock():
    """Forward and backward of a call with dropout agree on the random state that is saved between
    them."""
    problem = dense(256, 256)
    inputs = make_inputs(problem)

    def run():
        torch.manual_seed(7)
        q, k, v = (t.requires_grad_() for t in bhsd(inputs))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
        return torch.autograd.grad(out, (q, k, v), inputs.do.transpose(1, 2))

    without = run()
    with fa4_ext.register():
        owners = providers_of(run)
        assert "stock" in owners and "ours" not in owners
        ours = run()
    for name, a, b in zip(("dq", "dk", "dv"), ours, without, strict=True):
        # dq is summed with atomics.
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


REFUSED = {
    "dropout": (_attention(dropout_p=0.3), dict(), "dropout_p must be 0"),
    "debug_mask": (_flash_op(dropout_p=0.0, return_debug_mask=True), dict(), "return_debug_mask"),
    "alibi": (
        lambda q, k, v: _flash_op(alibi_slopes=torch.ones(4, device=DEVICE))(q, k, v),
        dict(),
        "alibi_slopes",
    ),
    "seqused_k": (
        lambda q, k, v: _flash_op(seqused_k=torch.ones(2, dtype=torch.int32, device=DEVICE))(
            q, k, v
        ),
        dict(),
        "seqused_k",
    ),
    "scale_of_0": (
        _flash_op(scale=0.0),
        dict(),
        "scale must be a positive normal number of float32, is 0",
    ),
    "negative_scale": (
        _attention(scale=-0.1),
        dict(),
        "scale must be a positive normal number of float32, is -0.1",
    ),
    "head_dim_264": (_flash_op(), dict(head_dim=264), "head_dim must be at most"),
    "fp32": (_flash_op(), dict(dtype=torch.float32), "dtype must be float16 or bfloat16"),
    "head_dim_20": (_flash_op(), dict(head_dim=20), "(head_dim|TMA)"),
}


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("case", REFUSED)
def test_strict_refuses_with_the_reason(case):
    call, fields, reason = REFUSED[case]
    fields = dict(head_dim=128, dtype=torch.bfloat16) | fields
    inputs = _normal(2, 4, 256, fields["head_dim"], dtype=fields["dtype"])
    with pytest.raises(RuntimeError, match=r"FA4 _\w+ unsupported: .*" + reason):
        call(*inputs)


@pytest.mark.parametrize("mask", ("full", "causal"))
@pytest.mark.parametrize("heads", ("mha", "gqa"))
@pytest.mark.parametrize("first", ("ours", "stock"))
def test_forward_and_backward_by_different_providers(first, heads, mask):
    """A causal mask with more queries than keys has rows without keys, whose lse is -inf in ours
    and +inf in stock's."""
    problem = dense(
        301, 203, heads=HEADS[heads][0], heads_kv=HEADS[heads][1], is_causal=mask == "causal"
    )
    inputs = make_inputs(problem)

    def registered(ours: bool, work):
        if not ours:
            return work()
        with fa4_ext.register(fallback="error", speed_rules=False):
            return work()

    forward = registered(first == "ours", lambda: flash_forward(problem, inputs))
    gradients = registered(first == "stock", lambda: flash_backward(problem, inputs, forward))
    assert_matches_reference(
        problem, inputs, Result(*forward[:2], *gradients), check_lse=first == "ours"
    )


@pytest.mark.parametrize("first", ("ours", "stock"))
def test_registration_changes_between_forward_and_backward(first):
    problem = dense(301, 301, is_causal=True)
    inputs = make_inputs(problem)
    q, k, v = (t.requires_grad_() for t in bhsd(inputs))
    handle = fa4_ext.register(fallback="error", speed_rules=False) if first == "ours" else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if handle:
        handle.remove()
    else:
        handle = fa4_ext.register(fallback="error", speed_rules=False)
    gradients = torch.autograd.grad(out, (q, k, v), inputs.do.transpose(1, 2))
    handle.remove()
    out, *gradients = (t.detach().transpose(1, 2) for t in (out, *gradients))
    assert_matches_reference(problem, inputs, Result(out, None, *gradients), check_lse=False)


@pytest.mark.usefixtures("strict")
def test_deterministic_through_autograd_is_bitwise():
    problem = dense(1023, 1023, heads=4, heads_kv=2, is_causal=True)
    inputs = make_inputs(problem)
    with deterministic():
        first, *others = (run_autograd(problem, inputs, backward=True) for _ in range(5))
    for other in others:
        for name in ("out", "dq", "dk", "dv"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name
