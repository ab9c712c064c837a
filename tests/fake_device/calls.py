"""Calls the overrides with tensors of the CPU, behind device.c, and prints what came back and what
was launched, a JSON a call."""

import contextlib
import ctypes
import json
import sys
from functools import partial

import torch

import fa4_ext

device = ctypes.CDLL("libcuda.so.1")
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
aten = torch.ops.aten


def described(tensor: torch.Tensor) -> dict:
    return {
        "shape": tensor.shape, "stride": tensor.stride(), "dtype": str(tensor.dtype),
        "begin": tensor.data_ptr(),
        "end": tensor.data_ptr() + tensor.nbytes, "memory": tensor.untyped_storage().data_ptr(),
        "memory_bytes": tensor.untyped_storage().nbytes(),
    }  # fmt: skip


def call(op, *arguments, **options) -> tuple:
    """Returns the results, and prints them with the launches."""
    ctypes.c_int.in_dll(device, "launches").value = 0
    ctypes.c_int.in_dll(device, "allocations").value = 0
    ctypes.c_int64.in_dll(device, "cleared_bytes").value = ctypes.c_int64.in_dll(
        device, "cleared_at"
    ).value = 0
    results = op.redispatch(CUDA, *arguments, **options)
    count = ctypes.c_int.in_dll(device, "launches").value
    names = (ctypes.c_char_p * 1024).in_dll(device, "launched")[:count]
    tensors = [
        described(t)
        for t in (results if isinstance(results, tuple) else (results,))
        if isinstance(t, torch.Tensor)
    ]
    found = {"tensors": tensors, "launches": [name.decode() for name in names]}
    found |= {
        name: ctypes.c_int64.in_dll(device, name).value for name in ("cleared_bytes", "cleared_at")
    }
    print(json.dumps(found | {"allocations": ctypes.c_int.in_dll(device, "allocations").value}))
    return results


def dense(heads: int, heads_kv: int, rows: int) -> list[torch.Tensor]:
    return [
        torch.randn(2, rows, h, 128, dtype=torch.bfloat16).transpose(1, 2)
        for h in (heads, heads_kv, heads_kv)
    ]


def sdpa(heads: int, heads_kv: int, rows: int = 129) -> None:
    q, k, v = dense(heads, heads_kv, rows)
    out, lse, cu_q, cu_k, max_q, max_k, rng_state, unused, _ = call(
        aten._scaled_dot_product_flash_attention.default, q, k, v, 0.0, True, False
    )
    gradient = torch.randn_like(out)
    call(
        aten._scaled_dot_product_flash_attention_backward.default,
        *(gradient, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, True, rng_state, unused),
    )


def cudnn(heads: int, heads_kv: int, rows: int = 129, keys: int = 129) -> None:
    q = dense(heads, heads_kv, rows)[0]
    _, k, v = dense(heads, heads_kv, keys)
    out, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = call(
        aten._scaled_dot_product_cudnn_attention.default, q, k, v, None, True, 0.0, True
    )
    call(
        aten._scaled_dot_product_cudnn_attention_backward.default,
        *(torch.randn_like(out), q, k, v, out, lse, seed, offset, None, cu_q, cu_k, max_q, max_k),
        *(0.0, True),
    )


def masks(heads: int, rows: int, keys: int) -> dict[str, torch.Tensor]:
    zeros = partial(torch.zeros, dtype=torch.bfloat16)
    return {
        "whole": zeros(2, heads, rows, keys),
        "of_heads": zeros(1, heads, rows, keys),
        "of_queries": zeros(rows, keys),
        "of_keys": zeros(2, 1, 1, keys),
        "expanded": zeros(2, 1, 1, keys).expand(2, heads, rows, keys),
        "odd_rows": zeros(rows, keys + 1)[:, :-1],
        "odd_address": zeros(rows, keys + 2)[:, 1:-1],
        "of_one_key": zeros(2, heads, rows, 1),
        "of_one_key_expanded": zeros(2, 1, rows, 1).expand(2, heads, rows, keys),
    }


def masked(heads: int, heads_kv: int, kind: str, rows: int = 129, keys: int = 202) -> None:
    q = dense(heads, heads_kv, rows)[0]
    _, k, v = dense(heads, heads_kv, keys)
    bias = masks(heads, rows, keys)[kind]
    out, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = call(
        aten._scaled_dot_product_cudnn_attention.default, q, k, v, bias, True, 0.0, False
    )
    call(
        aten._scaled_dot_product_cudnn_attention_backward.default,
        *(torch.randn_like(out), q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k),
        *(0.0, False),
    )


EFFICIENT = aten._scaled_dot_product_efficient_attention.default
EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default
WITHOUT_BIAS = [True, True, True, False]


def efficient(kind: str, rows: int = 129, keys: int = 202) -> None:
    """Calls the memory-efficient op with heads outside rows, which its results do not follow: with
    a logsumexp and a backward, and without them."""
    q = dense(4, 4, rows)[0].contiguous()
    k, v = (tensor.contiguous() for tensor in dense(4, 4, keys)[1:])
    bias = None if kind == "none" else masks(4, rows, keys)[kind].expand(2, 4, rows, keys)
    out, lse, seed, offset = call(EFFICIENT, q, k, v, bias, True)
    call(
        EFFICIENT_BACKWARD,
        *(torch.randn_like(out), q, k, v, bias, out, lse, seed, offset, 0.0, WITHOUT_BIAS),
    )
    call(EFFICIENT, q, k, v, bias, False)


def refused_by_efficient_op(*reason: str) -> None:
    """Prints the error of a call that is left to memory-efficient attention, which this machine
    lacks, or of one that our kernels turn down."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    what = " ".join(reason)
    first = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]
    choice = {
        "backend": lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
        "order": lambda: sdpa_kernel(first, set_priority=True),
        "flash first": lambda: sdpa_kernel(first[::-1], set_priority=True),
        "prefer": lambda: fa4_ext.register(fallback="error", prefer=False),
    }.get(what, contextlib.nullcontext)
    q, k, v = dense(4, 4, 129)
    if what == "fp32":
        q, k, v = q.float(), k.float(), v.float()
    bias = torch.zeros(2, 4, 129, 129, dtype=q.dtype, requires_grad=what == "bias with a gradient")
    dropout_p = 0.5 if what == "dropout" else 0.0
    with choice():
        try:
            out, lse, seed, offset = EFFICIENT.redispatch(CUDA, q, k, v, bias, True, dropout_p)
            if what == "gradient of bias":
                wanted = [True, True, True, True]
                backward = q, q, k, v, bias, out, lse, seed, offset, 0.0, wanted
                EFFICIENT_BACKWARD.redispatch(CUDA, *backward)
            print(json.dumps("ran"))
        except RuntimeError as error:
            print(json.dumps(str(error).splitlines()[0]))


REFUSED_BIASES = {
    "causal bias": torch.zeros(129, 129, dtype=torch.bfloat16),
    "bias of 3 dimensions": torch.zeros(2, 129, 129, dtype=torch.bfloat16),
    "bias of fewer keys": torch.zeros(129, 128, dtype=torch.bfloat16),
    "bias of fp32": torch.zeros(129, 129),
    "bias with a gradient": torch.zeros(129, 129, dtype=torch.bfloat16, requires_grad=True),
}


def refused_by_cudnn_op(*reason: str) -> None:
    """Prints the error of a call that the user's choice leaves to cuDNN, which this machine lacks,
    or of one that our kernels turn down."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = dense(4, 4, 129)
    other = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]
    chosen = {
        "backend": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        "order": lambda: sdpa_kernel(other, set_priority=True),
        "flash first": lambda: sdpa_kernel(other[::-1], set_priority=True),
        "prefer": lambda: fa4_ext.register(fallback="error", prefer=False),
        "seed": contextlib.nullcontext,
    }
    bias = REFUSED_BIASES.get(" ".join(reason))
    chosen |= dict.fromkeys(REFUSED_BIASES, contextlib.nullcontext)
    is_causal = bias is None or reason == ("causal", "bias")
    with chosen[" ".join(reason)]():
        try:
            if reason == ("seed",):
                aten._scaled_dot_product_cudnn_attention_backward.default.redispatch(
                    CUDA, q, q, k, v, q, torch.zeros(2, 4, 129, 1), torch.zeros(()),
                    torch.zeros(()), None, None, None, 129, 129, 0.0, True,
                )  # fmt: skip
            else:
                aten._scaled_dot_product_cudnn_attention.default.redispatch(
                    CUDA, q, k, v, bias, True, 0.0, is_causal
                )
            print(json.dumps("ran"))
        except RuntimeError as error:
            print(json.dumps(str(error).splitlines()[0]))


def varlen(heads: int, heads_kv: int) -> None:
    cu_seqlens = torch.tensor([0, 100, 229], dtype=torch.int32)
    q, k, v = (torch.randn(229, h, 128, dtype=torch.bfloat16) for h in (heads, heads_kv, heads_kv))
    lengths = (cu_seqlens, cu_seqlens, 129, 129, 0.0, True)
    out, lse, rng_state, unused, _ = call(
        aten._flash_attention_forward.default, q, k, v, *lengths, False
    )
    call(
        aten._flash_attention_backward.default,
        torch.randn_like(out),
        q,
        k,
        v,
        out,
        lse,
        *lengths,
        rng_state,
        unused,
    )


def paged(heads: int, heads_kv: int, columns: int) -> None:
    """Calls with a block table of so many columns, few of which are in use."""
    q = torch.randn(2, heads, 128, dtype=torch.bfloat16)
    cache = torch.randn(3, 64, heads_kv, 128, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 1, 2], dtype=torch.int32)
    table = torch.full((2, columns), -1, dtype=torch.int32)
    table[:, :2] = torch.tensor([[2, 0], [1, -1]])
    used = torch.tensor([100, 20], dtype=torch.int32)
    arguments = q, cache, cache, cu_seqlens, None, 1, 64 * columns, 0.0, False, False
    options = {"block_table": table, "seqused_k": used}
    call(aten._flash_attention_forward.default, *arguments, **options)
    call(
        aten._flash_attention_forward_no_dropout_inplace.default,
        torch.empty_like(q),
        *arguments,
        **options,
    )


def own(heads: int, heads_kv: int) -> None:
    """Calls this library's op, which needs no registration: forward, backward, and a step of
    decoding from a dense cache whose heads lie outside its rows."""
    ops = torch.ops.fa4_ext
    q, k, v = (tensor.transpose(1, 2) for tensor in dense(heads, heads_kv, 129))
    mask = None, True, -1, -1
    lengths = None, None, 129, 129
    out, lse = call(ops.attention.default, q, k, v, *lengths, None, None, *mask, 0, False)
    call(
        ops.attention_backward.default,
        *(torch.randn_like(out), q, k, v, out, lse, *lengths, *mask, False),
    )
    cache = torch.randn(2, heads_kv, 256, 128, dtype=torch.bfloat16).transpose(1, 2)
    used = torch.tensor([100, 256], dtype=torch.int32)
    lengths = None, None, 1, 256, used, None
    call(ops.attention.default, q[:, :1], cache, cache, *lengths, *mask, 0, False)


def inplace(heads: int, heads_kv: int) -> None:
    q, k, v = (t.transpose(1, 2) for t in dense(heads, heads_kv, 129))
    out = torch.empty_like(q)
    call(
        aten._flash_attention_forward_no_dropout_inplace.default,
        out,
        q,
        k,
        v,
        None,
        None,
        129,
        129,
        0.0,
        True,
        False,
    )


def inplace_by_a_copy() -> None:
    """Prints what is left of sevens in outputs that TMA cannot write: of packed sequences among
    other rows, whose kernel is not really launched, and of sequences without keys."""
    op = aten._flash_attention_forward_no_dropout_inplace.default
    offsets = torch.tensor([3, 10], dtype=torch.int32)
    q, k, v = (torch.randn(20, 4, 128, dtype=torch.bfloat16) for _ in range(3))
    for keys, cu_seqlens_k in ((20, offsets), (0, torch.zeros_like(offsets))):
        out = torch.full((20, 4, 131), 7.0, dtype=q.dtype)[..., :-3]
        lengths = offsets, cu_seqlens_k, 7, 7 if keys else 0
        op.redispatch(CUDA, out, q, k[:keys], v[:keys], *lengths, 0.0, False, False)
        print(json.dumps([out.min().item(), out.max().item()]))


COMMANDS = {
    "sdpa": sdpa, "cudnn": cudnn, "masked": masked, "varlen": varlen, "paged": paged,
    "inplace": inplace, "inplace_by_a_copy": inplace_by_a_copy, "efficient": efficient,
}  # fmt: skip
REFUSED = {
    "refused_by_cudnn_op": refused_by_cudnn_op, "refused_by_efficient_op": refused_by_efficient_op,
}  # fmt: skip

if sys.argv[1] == "own":
    own(*map(int, sys.argv[2:]))
else:
    with fa4_ext.register(fallback="error", speed_rules=False):
        if sys.argv[1] in REFUSED:
            REFUSED[sys.argv[1]](*sys.argv[2:])
        else:
            COMMANDS[sys.argv[1]](*(int(a) if a.isdigit() else a for a in sys.argv[2:]))
