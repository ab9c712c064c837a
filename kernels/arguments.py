"""The arguments of every op's entry, in the order they are passed: the one declaration of them.

The symbolic tensors that an entry is compiled for (kernels/common/symbolic.py) and the C signature
that its object must export (kernels/signature.py) both derive from it. The C++ side passes an array
of pointers in this order and checks their number (kernels/table.py); the build checks the order of
the object's (kernels/signature.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kernels.kernel import Kernel, Layout, Mask, Op

TMA_ALIGN = 8  # elements of 2 bytes: TMA wants 16-byte strides and addresses
ACCUM_ALIGN = 4  # fp32 elements: 16-byte vectors


@dataclass(frozen=True)
class Tensor:
    """A tensor. All its shapes are run-time values, and all its strides except the innermost, which
    is one."""

    dtype: str | None  # None: the kernel's own
    modes: int  # of a packed tensor
    batched: bool = False  # a dense one has a mode more, the batch
    align: int = 1  # elements that its address and strides are multiples of
    align_last: int = 1  # elements that its last shape is a multiple of

    def modes_of(self, kernel: Kernel) -> int:
        return self.modes + (self.batched and not kernel.packed)


@dataclass(frozen=True)
class Scalar:
    dtype: str


# [batch, seqlen, heads, head_dim] or [total, heads, head_dim]: q, k, v, o and their gradients
ATTENTION = Tensor(None, 3, batched=True, align=TMA_ALIGN, align_last=TMA_ALIGN)
# [pages, page_size, heads, head_dim]: keys or values, whatever the layout of the queries
PAGES = Tensor(None, 4, align=TMA_ALIGN, align_last=TMA_ALIGN)
# [batch, heads, seqlen] or [heads, total]: lse, and delta of a backward in two passes
LSE = Tensor("fp32", 2, batched=True)
# [batch, heads, n] or [heads, n], in the workspace: delta, lse in base 2, accumulators
WORKSPACE = Tensor("fp32", 2, batched=True, align=ACCUM_ALIGN)
# [batch, heads, queries, keys], read in pairs of 16-bit elements. What is broadcast has a stride of
# 0; of the MAP ops the batch and the heads are those that differ.
BIAS = Tensor(None, 3, batched=True, align=2)
# [batch, heads, query tiles, header and key blocks], or [..., key blocks, header and query tiles]:
# what kernels/sm90/bias.py says of lists
LISTS = Tensor("int32", 4)
# [batch, heads, tiles of 64 queries, tiles of 64 keys]: kinds of kernels/sm90/lists.py
CELLS = Tensor("int32", 4)
SEMAPHORE = Tensor("int32", 4)  # [batch, heads, blocks, slots]
VECTOR = Tensor("int32", 1)  # cu_seqlens [batch + 1], seqused_k [batch], a counter [1]
# This is either the lengths of packed keys, [1 or 2, batch + 1], or a block table, [batch, pages].
# Of the lengths, row 0 is cu_seqlens_k, and row 1, if given, is seqused_k (batch elements), one
# stride away.
MATRIX = Tensor("int32", 2)
FLOAT = Scalar("fp32")
INT = Scalar("int32")

Kind = Tensor | Scalar


@dataclass(frozen=True)
class Argument:
    name: str
    kind: Kind
    given: bool = True  # else the entry's parameter is None, and the object takes no such argument


def _all(kind: Kind, *names: str, given: bool = True) -> Iterator[Argument]:
    return (Argument(name, kind, given) for name in names)


def forward(kernel: Kernel) -> Iterator[Argument]:
    paged = kernel.layout is Layout.PAGED
    yield Argument("q", ATTENTION)
    yield from _all(PAGES if paged else ATTENTION, "k", "v")
    yield Argument("o", ATTENTION)
    yield Argument("lse", LSE)
    yield Argument("scale", FLOAT)
    yield Argument("cu_seqlens_q", VECTOR, kernel.packed)
    yield Argument("key_lengths", MATRIX, kernel.layout is Layout.VARLEN)
    yield from _all(INT, "window_size_left", "window_size_right")
    if kernel.arch == 90:
        yield from _all(INT, "num_ctas", "paired_heads")
        yield Argument("counter", VECTOR, kernel.packed)
        yield from _of_bias(kernel)
    else:
        yield from _all(INT, "max_seqlen_q", "sm_count")
    # tensors of no elements where the caller gives none
    yield from _all(VECTOR, "cu_seqlens_k", "seqused_k", given=paged)
    yield Argument("block_table", MATRIX, paged)


def _of_bias(kernel: Kernel) -> Iterator[Argument]:
    given = kernel.mask is Mask.BIAS
    yield Argument("bias", BIAS, given)
    yield Argument("lists", LISTS, given)


def decode(kernel: Kernel) -> Iterator[Argument]:
    yield from _all(ATTENTION, "q", "k", "v", "o")
    yield Argument("lse", LSE)
    yield Argument("scale", FLOAT)
    # tensors of no elements where the caller gives none
    yield from _all(VECTOR, "cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    yield Argument("block_table", MATRIX)
    yield from _all(INT, "window_size_left", "window_size_right", "max_seqlen_q", "splits")


def backward(kernel: Kernel) -> Iterator[Argument]:
    varlen = kernel.layout is Layout.VARLEN
    yield from _all(ATTENTION, "q", "k", "v", "dout")
    yield from _all(WORKSPACE, "lse_log2", "delta", "dq_accum")
    yield from _all(WORKSPACE if kernel.grouped else ATTENTION, "dk", "dv")
    yield Argument("scale", FLOAT)
    yield from _all(VECTOR, "cu_seqlens_q", "cu_seqlens_k", given=varlen)
    yield from _all(INT, "window_size_left", "window_size_right")
    yield Argument("dq_semaphore", SEMAPHORE, kernel.deterministic)
    shared = kernel.deterministic and kernel.grouped
    yield from _all(SEMAPHORE, "dk_semaphore", "dv_semaphore", given=shared)


def backward_groups(kernel: Kernel) -> Iterator[Argument]:
    yield from _all(ATTENTION, "q", "k", "v", "dout")
    yield from _all(WORKSPACE, "lse_log2", "delta", "dq_accum")
    yield from _all(ATTENTION, "dk", "dv")
    yield Argument("scale", FLOAT)
    varlen = kernel.layout is Layout.VARLEN
    yield from _all(VECTOR, "cu_seqlens_q", "cu_seqlens_k", given=varlen)
    yield Argument("heads_together", INT)


def backward_queries(kernel: Kernel) -> Iterator[Argument]:
    yield from _all(ATTENTION, "q", "k", "v", "o", "dout")
    yield from _all(LSE, "lse", "delta")
    yield Argument("dq", ATTENTION)
    yield from _of_two_passes(kernel)


def backward_keys(kernel: Kernel) -> Iterator[Argument]:
    yield from _all(ATTENTION, "q", "k", "v", "dout")
    yield from _all(LSE, "lse", "delta")
    yield from _all(ATTENTION, "dk", "dv")
    yield from _of_two_passes(kernel)
    yield Argument("splits", INT)


def _of_two_passes(kernel: Kernel) -> Iterator[Argument]:
    yield Argument("scale", FLOAT)
    varlen = kernel.layout is Layout.VARLEN
    yield from _all(VECTOR, "cu_seqlens_q", "cu_seqlens_k", given=varlen)
    yield from _all(INT, "window_size_left", "window_size_right")
    yield from _of_bias(kernel)


def map_queries(kernel: Kernel) -> Iterator[Argument]:
    yield Argument("bias", BIAS)
    yield Argument("cells", CELLS)
    yield Argument("lists", LISTS)


def map_keys(kernel: Kernel) -> Iterator[Argument]:
    yield Argument("cells", CELLS)
    yield Argument("lists", LISTS)


def preprocess(kernel: Kernel) -> Iterator[Argument]:
    yield from _all(ATTENTION, "o", "dout")
    yield Argument("delta", WORKSPACE)
    yield Argument("lse", LSE)
    yield from _all(WORKSPACE, "lse_log2", "dq_accum")
    yield Argument("cu_seqlens_q", VECTOR, kernel.layout is Layout.VARLEN)


def postprocess(kernel: Kernel) -> Iterator[Argument]:
    varlen = kernel.layout is Layout.VARLEN
    yield Argument("accum", WORKSPACE)
    yield Argument("gradient", ATTENTION)
    yield Argument("scale", FLOAT)
    yield Argument("cu_seqlens", VECTOR, varlen)
    yield from _all(ATTENTION, "dk", "dv", given=varlen)
    yield Argument("cu_seqlens_k", VECTOR, varlen)


def clear(kernel: Kernel) -> Iterator[Argument]:
    yield from _all(ATTENTION, "dq", "dk", "dv")
    yield from _all(VECTOR, "cu_seqlens_q", "cu_seqlens_k")
    yield Argument("num_ctas", INT)


DECLARED: dict[Op, Callable[[Kernel], Iterator[Argument]]] = {
    Op.FORWARD: forward,
    Op.DECODE: decode,
    Op.BACKWARD: backward,
    Op.BACKWARD_GROUPS: backward_groups,
    Op.BACKWARD_QUERIES: backward_queries,
    Op.BACKWARD_KEYS: backward_keys,
    Op.MAP_QUERIES: map_queries,
    Op.MAP_KEYS: map_keys,
    Op.PREPROCESS: preprocess,
    Op.POSTPROCESS: postprocess,
    Op.CLEAR: clear,
}


def declared(kernel: Kernel) -> tuple[Argument, ...]:
    """The parameters of a kernel's entry but the last, a stream."""
    return tuple(DECLARED[kernel.op](kernel))
