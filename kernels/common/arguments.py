"""Symbolic tensors that the entries are compiled for, and the order they are passed in.

What is symbolic here is a run-time value of the object: batch, lengths, heads, head_dim (a multiple
of 8 up to the bucket) and every stride but the last dimension's. kernels/signature.py says what
export_to_c makes of them.
"""

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32
from quack.compile_utils import make_fake_tensor

from kernels.matrix import Kernel, Layout

DTYPES = {"bf16": BFloat16, "fp16": Float16}
TMA_ALIGN = 8  # elements of 2 bytes: TMA wants 16-byte strides and addresses
ACCUM_ALIGN = 4  # fp32 elements: 16-byte vectors


def sequence_dims(kernel: Kernel) -> tuple:
    return (
        (cute.sym_int(), cute.sym_int())
        if kernel.layout is not Layout.VARLEN
        else (cute.sym_int(),)
    )


def qkvo(kernel: Kernel):
    """[batch, seqlen, heads, head_dim] or [total, heads, head_dim]"""
    head_dim = cute.sym_int(divisibility=TMA_ALIGN)
    return make_fake_tensor(
        DTYPES[kernel.dtype],
        (*sequence_dims(kernel), cute.sym_int(), head_dim),
        divisibility=TMA_ALIGN,
    )


def rows(kernel: Kernel, divisibility: int):
    """fp32 [batch, heads, n] or [heads, n]: lse, delta, accumulators"""
    batch = (cute.sym_int(),) if kernel.layout is not Layout.VARLEN else ()
    return make_fake_tensor(
        Float32, (*batch, cute.sym_int(), cute.sym_int()), divisibility=divisibility
    )


def semaphore(kernel: Kernel):
    """int32 [batch, heads, blocks, slots]"""
    return make_fake_tensor(Int32, tuple(cute.sym_int() for _ in range(4)), divisibility=1)


def cu_seqlens(kernel: Kernel):
    """int32 [batch + 1]"""
    return make_fake_tensor(Int32, (cute.sym_int(),), divisibility=1)


def varlen(kernel: Kernel):
    return (
        (cu_seqlens(kernel), cu_seqlens(kernel)) if kernel.layout is Layout.VARLEN else (None, None)
    )


def stream():
    return cute.runtime.make_fake_stream()


def key_lengths(kernel: Kernel):
    """int32 [1 or 2, batch + 1]: cu_seqlens_k and, as far away as the stride says, the batch
    elements of seqused_k if given"""
    return (
        make_fake_tensor(Int32, (cute.sym_int(), cute.sym_int()), divisibility=1)
        if kernel.layout is Layout.VARLEN
        else None
    )


def forward(kernel: Kernel) -> tuple:
    q, k, v, o = (qkvo(kernel) for _ in range(4))
    return (
        q,
        k,
        v,
        o,
        rows(kernel, 1),
        Float32(0),
        varlen(kernel)[0],
        key_lengths(kernel),
        Int32(0),
        Int32(0),
        stream(),
    )


def forward_sm100(kernel: Kernel) -> tuple:
    *leading, last = forward(kernel)
    return *leading, Int32(0), Int32(0), last


def decode(kernel: Kernel) -> tuple:
    q, k, v, o = (qkvo(kernel) for _ in range(4))
    # cu_seqlens_q, cu_seqlens_k, seqused_k: of no elements where not given
    lengths = [cu_seqlens(kernel) for _ in range(3)]
    block_table = make_fake_tensor(Int32, (cute.sym_int(), cute.sym_int()), divisibility=1)
    return (
        q,
        k,
        v,
        o,
        rows(kernel, 1),
        Float32(0),
        *lengths,
        block_table,
        *(Int32(0) for _ in range(4)),
        stream(),
    )


def backward(kernel: Kernel) -> tuple:
    q, k, v, dout = (qkvo(kernel) for _ in range(4))
    lse_log2, delta, dq_accum = (rows(kernel, ACCUM_ALIGN) for _ in range(3))
    dk, dv = (rows(kernel, ACCUM_ALIGN) if kernel.grouped else qkvo(kernel) for _ in range(2))
    dq_semaphore = semaphore(kernel) if kernel.deterministic else None
    dk_semaphore, dv_semaphore = (
        semaphore(kernel) if kernel.deterministic and kernel.grouped else None for _ in range(2)
    )
    return (
        q, k, v, dout, lse_log2, delta, dq_accum, dk, dv, Float32(0), *varlen(kernel), Int32(0),
        Int32(0),
        dq_semaphore, dk_semaphore, dv_semaphore, stream(),
    )  # fmt: skip


def preprocess(kernel: Kernel) -> tuple:
    o, dout = (qkvo(kernel) for _ in range(2))
    delta, lse, lse_log2, dq_accum = (
        rows(kernel, align) for align in (ACCUM_ALIGN, 1, ACCUM_ALIGN, ACCUM_ALIGN)
    )
    return o, dout, delta, lse, lse_log2, dq_accum, varlen(kernel)[0], stream()


def clear(kernel: Kernel) -> tuple:
    return *(qkvo(kernel) for _ in range(3)), *varlen(kernel), Int32(0), stream()


def postprocess(kernel: Kernel) -> tuple:
    dk, dv = (qkvo(kernel) if kernel.layout is Layout.VARLEN else None for _ in range(2))
    cu_seqlens, cu_seqlens_k = varlen(kernel)
    return (
        rows(kernel, ACCUM_ALIGN),
        qkvo(kernel),
        Float32(0),
        cu_seqlens,
        dk,
        dv,
        cu_seqlens_k,
        stream(),
    )


def forward_sm90(kernel: Kernel) -> tuple:
    *leading, last = forward(kernel)
    counter = (
        make_fake_tensor(Int32, (cute.sym_int(),), divisibility=1)
        if kernel.layout is Layout.VARLEN
        else None
    )
    return *leading, Int32(0), Int32(0), counter, last
