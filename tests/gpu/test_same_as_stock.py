"""A registration changes nothing where PyTorch refuses a call or rewrites it before it reaches us:
the result or the error is the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from calls import flash_forward
from cases import DEVICE, Inputs, dense
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa4_ext

# Two correct kernels differ by some roundings in bf16. What a transform gets wrong differs by the
# values.
TOLERANCE = 2e-2


def outcome(call):
    """Returns what `call()` returns, or the exception that it raises."""
    try:
        return call()
    except Exception as error:
        return error


def tensors_of(result) -> list[torch.Tensor]:
    return [
        leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)
    ]


def described(error: Exception) -> tuple:
    """Returns type and text. Where the text has more lines, they may list what is registered,
    fa4_ext too."""
    return type(error), str(error).strip().partition("\n")[0]


def assert_same_outcome(call) -> None:
    """Asserts that `call` has the same outcome with PyTorch's flash attention and with ours, or
    what falls back from ours."""
    stock = outcome(call)
    with fa4_ext.register(speed_rules=False):
        ours = outcome(call)
    if isinstance(stock, Exception):
        assert isinstance(ours, Exception) and described(ours) == described(stock), (
            f"ours: {ours!r}, stock: {stock!r}"
        )
        return
    assert not isinstance(ours, Exception), f"ours: {ours!r}, stock returns"
    for a, b in zip(tensors_of(ours), tensors_of(stock), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        torch.testing.assert_close(
            a, b, atol=TOLERANCE * float(b.abs().max()) if b.numel() else 0, rtol=TOLERANCE
        )


def normal(*shape: int, dtype=torch.bfloat16, device=DEVICE) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def attend(q, k, v, **options):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **options)


def loss(q, k, v):
    return attend(q, k, v, is_causal=True).float().square().sum()


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device=DEVICE))

    def forward(self, q, k, v):
        return attend(q * self.scale, k, v)


TRANSFORMS = {
    "grad": lambda q, k, v: grad(loss, argnums=(0, 1, 2))(q[0], k[0], v[0]),
    "vjp": lambda q, k, v: vjp(attend, q[0], k[0], v[0])[1](v[0]),
    "vmap": lambda q, k, v: vmap(attend)(q, k, v),
    "vmap_of_queries_alone": lambda q, k, v: vmap(attend, in_dims=(0, None, None))(q, k[0], v[0]),
    "vmap_over_last_dim_but_one": lambda q, k, v: vmap(attend, in_dims=3, out_dims=3)(
        *(t.movedim(0, 3) for t in (q, k, v))
    ),
    "vmap_of_grad": lambda q, k, v: vmap(grad(loss))(q, k, v),
    "jvp": lambda q, k, v: jvp(attend, (q[0], k[0], v[0]), (v[0], q[0], k[0])),
    "grad_of_grad": lambda q, k, v: grad(lambda x: grad(loss)(x, k[0], v[0]).float().sum())(q[0]),
    "functional_call": lambda q, k, v: functional_call(
        module := Attention(), dict(module.named_parameters()), (q[0], k[0], v[0])
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform):
    """Tensors are [3, batch, heads, seqlen, head_dim]. Forward-mode and second derivatives are
    PyTorch's to refuse."""
    tensors = [normal(3, 2, 4, 128, 64) for _ in range(3)]
    assert_same_outcome(lambda: TRANSFORMS[transform](*tensors))


def three(*shape: int, **options):
    return lambda: [normal(*shape, **options) for _ in range(3)]


REFUSED_BY_SDPA = {
    "three_dims": three(2, 128, 64),
    "one_dim": three(64),
    "batch_to_broadcast": lambda: [
        normal(1, 4, 128, 64),
        normal(2, 4, 128, 64),
        normal(2, 4, 128, 64),
    ],
    "heads_without_enable_gqa": lambda: [
        normal(2, 4, 128, 64),
        normal(2, 2, 128, 64),
        normal(2, 2, 128, 64),
    ],
    "no_queries": lambda: [normal(2, 4, 0, 64), normal(2, 4, 128, 64), normal(2, 4, 128, 64)],
    "no_keys": lambda: [normal(2, 4, 128, 64), normal(2, 4, 0, 64), normal(2, 4, 0, 64)],
    "last_dim_strided": lambda: [t.transpose(2, 3) for t in three(2, 4, 64, 128)()],
    "head_dim_257": three(2, 4, 128, 257),
    "float32": three(2, 4, 128, 64, dtype=torch.float32),
    "float64": three(2, 4, 128, 64, dtype=torch.float64),
    "different_dtypes": lambda: [
        normal(2, 4, 128, 64),
        *three(2, 4, 128, 64, dtype=torch.float16)()[1:],
    ],
    "different_devices": lambda: [normal(2, 4, 128, 64), *three(2, 4, 128, 64, device="cpu")()[1:]],
}


@pytest.mark.parametrize("case", REFUSED_BY_SDPA)
def test_what_sdpa_keeps_from_flash_attention(case):
    """PyTorch's list of what flash attention can't do stays in force with flash attention alone
    enabled."""
    assert_same_outcome(partial(attend, *REFUSED_BY_SDPA[case]()))


@pytest.mark.parametrize(
    "options",
    [dict(is_causal=True), dict(attn_mask=True)],
    ids=["causal_of_unequal_lengths", "attn_mask"],
)
def test_masks_that_sdpa_keeps_from_flash_attention(options):
    if "attn_mask" in options:
        options = dict(attn_mask=torch.ones(128, 256, dtype=torch.bool, device=DEVICE))
    q, k, v = normal(2, 4, 128, 64), normal(2, 4, 256, 64), normal(2, 4, 256, 64)
    assert_same_outcome(partial(attend, q, k, v, **options))


def nested(seqlens, heads: int = 4, head_dim: int = 64) -> torch.Tensor:
    """Returns a strided nested tensor, [batch, heads, (seqlens), head_dim]."""
    return torch.nested.nested_tensor(
        [normal(length, heads, head_dim) for length in seqlens]
    ).transpose(1, 2)


NESTED = {
    "head_dim_57": lambda: [nested((65, 129), head_dim=57) for _ in range(3)],
    "empty_sequence": lambda: [nested((65, 0, 129)) for _ in range(3)],
    "heads_to_broadcast": lambda: [
        nested((65, 129)),
        nested((65, 129), heads=1),
        nested((65, 129), heads=1),
    ],
}


@pytest.mark.parametrize("case", NESTED)
def test_nested_tensors_that_are_refused_or_broadcast(case):
    tensors = NESTED[case]()
    assert_same_outcome(lambda: attend(*tensors).unbind())


# The columns are seqlen_q, seqlen_k and batch. Without queries PyTorch's kernel fails.
EMPTY = {"no_keys": (65, 0, 2), "no_batch": (65, 65, 0)}


@pytest.mark.parametrize("case", EMPTY)
def test_empty_tensors_of_the_op(case):
    seqlen_q, seqlen_k, batch = EMPTY[case]
    problem = dense(seqlen_q, seqlen_k, batch=max(batch, 1))
    q, k = (normal(batch, seqlen, 4, 128) for seqlen in (seqlen_q, seqlen_k))
    inputs = Inputs(q, k, torch.randn_like(k), do=None)
    assert_same_outcome(lambda: flash_forward(problem, inputs)[0])


def flash_op(*shape: int, dtype=torch.bfloat16, **options):
    """Calls the low-level op, which nothing checks before the kernels do."""

    def call():
        tensors = [normal(*shape, dtype=dtype) for _ in range(3)]
        arguments = (
            *tensors,
            None,
            None,
            128,
            128,
            options.get("dropout_p", 0.0),
            False,
            options.get("return_debug_mask", False),
        )
        rest = {
            name: value
            for name, value in options.items()
            if name not in ("dropout_p", "return_debug_mask")
        }
        return torch.ops.aten._flash_attention_forward(*arguments, **rest)

    return call


REFUSED_BY_STOCK = {
    "float32": flash_op(2, 128, 4, 64, dtype=torch.float32),
    "head_dim_264": flash_op(2, 128, 4, 264),
    "head_dim_20": flash_op(2, 128, 4, 20),
    "dropout_of_1": flash_op(2, 128, 4, 64, dropout_p=1.0),
    "debug_mask_without_dropout": flash_op(2, 128, 4, 64, return_debug_mask=True),
    "window_with_dropout": flash_op(
        2, 128, 4, 64, dropout_p=0.5, window_size_left=8, window_size_right=8
    ),
    "alibi": lambda: flash_op(2, 128, 4, 64, alibi_slopes=torch.ones(4, device=DEVICE))(),
    "seqused_k_of_dense": lambda: flash_op(
        2, 128, 4, 64, seqused_k=torch.ones(2, dtype=torch.int32, device=DEVICE)
    )(),
    "cpu_lengths": lambda: torch.ops.aten._flash_attention_forward(
        *(normal(128, 4, 64) for _ in range(3)),
        *(torch.tensor([0, 128], dtype=torch.int32),) * 2,
        128,
        128,
        0.0,
        False,
        False,
    ),
    "sdpa_op_of_three_dims": lambda: torch.ops.aten._scaled_dot_product_flash_attention(
        *(normal(2, 128, 64) for _ in range(3))
    ),
    "sdpa_op_of_one_dim": lambda: torch.ops.aten._scaled_dot_product_flash_attention(
        *(normal(64) for _ in range(3))
    ),
}


@pytest.mark.parametrize("case", REFUSED_BY_STOCK)
def test_what_stock_makes_of_a_call_that_we_leave_to_it(case):
    """The calls raise errors of every type, or are right: random numbers are drawn from the same
    seed."""

    def call():
        torch.manual_seed(3)
        results = REFUSED_BY_STOCK[case]()
        # The others are uninitialised, or random.
        return results[:2]

    assert_same_outcome(call)
