"""The arguments of every compiled object, in the order they are passed.

The C++ side (csrc/core/launch) passes an array of pointers in this order without knowing
better, so the build compares what the compiler exported with what is written here and fails on a
difference.

A tensor is a struct of its address, its dynamic shapes (int32) and its dynamic strides (int64); the
innermost stride is always one.
"""

from kernels.matrix import Kernel, Layout, Op


def tensor(name: str, shapes: int, strides: int) -> str:
    return f"{name}: tensor of {shapes} shapes, {strides} strides"


def float32(name: str) -> str:
    return f"{name}: float"


def int32(name: str) -> str:
    return f"{name}: int32_t"


STREAM = "stream: cudaStream_t"
STATUS = "ret: int32_t"  # written by the callee: a cudaError_t


def expected(kernel: Kernel) -> tuple[str, ...]:
    dense = kernel.layout is not Layout.VARLEN
    batch = 1 if dense else 0

    def qkvo(*names):  # [batch, seqlen, heads, head_dim] or [total, heads, head_dim]
        return [tensor(name, 3 + batch, 2 + batch) for name in names]

    def rows(*names):  # [batch, heads, n] or [heads, n]
        return [tensor(name, 2 + batch, 1 + batch) for name in names]

    def varlen(*names):  # [batch + 1]
        return [] if dense else [tensor(name, 1, 0) for name in names]

    def semaphores(*names):  # [batch, heads, blocks, slots]
        return [tensor(name, 4, 3) for name in names]

    key_lengths = [] if dense else [tensor("key_lengths", 2, 1)]  # [1 or 2, batch + 1]
    window = [int32("window_size_left"), int32("window_size_right")]
    match kernel.op:
        case Op.FORWARD:
            arguments = [
                *qkvo("q", "k", "v", "o"), *rows("lse"), float32("scale"), *varlen("cu_seqlens_q"),
                *key_lengths, *window,
                *([int32("max_seqlen_q"), int32("sm_count")] if kernel.arch == 100 else []),
                *([int32("workers"), int32("paired")] if kernel.persistent else []),
                *([tensor("counter", 1, 0)] if kernel.persistent and not dense else []),
            ]  # fmt: skip
        case Op.DECODE:
            arguments = [
                *qkvo("q", "k", "v", "o"), *rows("lse"), float32("scale"),
                *(tensor(name, 1, 0) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")),
                tensor("block_table", 2, 1),
                *window, int32("max_seqlen_q"), int32("splits"),
            ]  # fmt: skip
        case Op.BACKWARD:
            arguments = [
                *qkvo("q", "k", "v", "dout"), *rows("lse_log2", "delta", "dq_accum"),
                *(rows("dk", "dv") if kernel.grouped else qkvo("dk", "dv")),
                float32("scale"), *varlen("cu_seqlens_q", "cu_seqlens_k"), *window,
                *(semaphores("dq_semaphore") if kernel.deterministic else []),
                *(
                    semaphores("dk_semaphore", "dv_semaphore")
                    if kernel.deterministic and kernel.grouped else []
                ),
            ]  # fmt: skip
        case Op.PREPROCESS:
            arguments = [
                *qkvo("o", "dout"),
                *rows("delta", "lse", "lse_log2", "dq_accum"),
                *varlen("cu_seqlens_q"),
            ]
        case Op.CLEAR:
            arguments = [
                *qkvo("dq", "dk", "dv"),
                *varlen("cu_seqlens_q", "cu_seqlens_k"),
                int32("workers"),
            ]
        case Op.POSTPROCESS:
            arguments = [*rows("accum"), *qkvo("gradient"), float32("scale"), *varlen("cu_seqlens")]
            arguments += [] if dense else [*qkvo("dk", "dv"), *varlen("cu_seqlens_k")]
    return (*arguments, STREAM, STATUS)


def check(kernel: Kernel, exported: tuple[str, ...]) -> None:
    if tuple(exported) != expected(kernel):
        raise ValueError(
            f"kernel {kernel.name}: its object takes\n  " + "\n  ".join(exported)
            + "\nbut kernels/signature.py and csrc/core/launch have\n  "
            + "\n  ".join(expected(kernel))
        )  # fmt: skip
