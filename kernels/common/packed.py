"""Packed sequences as every kernel reads them: it touches no row of another sequence, and none
outside of the tensor.

Two things need care. A sequence's last tile goes on into the next sequence, or into rows that
belong to none. Their probabilities are zero, but zero times a NaN there is NaN; so TMA sees a
sequence's rows as the last ones before a bound, and fills with zeros what lies beyond it. And
cu_seqlens and seqused_k come from the caller, in device memory, and may hold anything; so every
value that is read from them is clamped to the rows that the tensor has.
"""

from dataclasses import dataclass, fields, replace
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from flash_attn.cute.seqlen_info import SeqlenInfoQK
from flash_attn.cute.tile_scheduler import SingleTileVarlenScheduler, VarlenDecoder
from quack import copy_utils
from quack.cute_dsl_utils import ParamsBase

from kernels.arguments import TMA_ALIGN


def clamp(value: Int32, most: Int32) -> Int32:
    return cutlass.min(cutlass.max(value, 0), most)


@dataclass
class Offsets(ParamsBase):
    """cu_seqlens, which upstream's code indexes like a tensor. No value lies outside of the rows
    that there are."""

    values: cute.Tensor  # int32 [batch + 1]
    total: Int32  # rows of the packed tensor

    @property
    def shape(self):
        return self.values.shape

    def __getitem__(self, index) -> Int32:
        return clamp(self.values[index], self.total)


@dataclass
class KeyLengths(ParamsBase):
    """Where each sequence's keys begin, and how many of them are in use."""

    values: cute.Tensor  # int32 [1 or 2, batch + 1]: cu_seqlens_k and, where given, seqused_k
    total: Int32  # rows of the packed keys

    def offset(self, index) -> Int32:
        return clamp(self.values[0, index], self.total)

    def place(self, index) -> tuple[Int32, Int32]:
        """Where a sequence's keys begin, and how many of them are in use."""
        begin = self.offset(index)
        return begin, keys_in_use(self, index, self.offset(index + 1) - begin)


for kind in (Offsets, KeyLengths):  # upstream's kernels take tensors alone
    cute.Tensor.register(kind)


@cute.jit
def keys_in_use(lengths: KeyLengths, index: Int32, rows: Int32) -> Int32:
    """The number of keys that a sequence's queries see. The sequence has `rows`, of which seqused_k
    may leave some out."""
    result = cutlass.max(rows, 0)
    if cute.size(lengths.values, mode=[0]) > 1:
        result = clamp(lengths.values[1, index], result)
    return result


def sequences(packed: cute.Tensor) -> cute.Tensor:
    """A view of [total, heads, head_dim] as [(2^30, row after a sequence's last), 2^30, heads,
    head_dim], in which the sequence's rows are the last.

    A view with one mode less would begin far below the tensor, and TMA faults there when a load
    lies out of bounds altogether.
    """
    view = copy_utils.create_ragged_tensor_for_tma(packed, ragged_dim=0)
    rows, heads, head_dim, *after = zip(view.shape, view.stride, strict=True)
    shape, stride = zip(tuple(zip(*after, strict=True)), rows, heads, head_dim, strict=True)
    return cute.make_tensor(view.iterator, cute.make_layout(shape, stride=stride))


def as_subclass(kind: type, found, **changes):
    """Makes an upstream dataclass one of ours that extends it, with some fields changed."""
    return kind(**{field.name: getattr(found, field.name) for field in fields(found)} | changes)


def rows_of(tensor: cute.Tensor, row_mode: int, end: Int32, count: Int32) -> cute.Tensor:
    """The `count` rows before `end`. `tensor` is one of `sequences`, permuted so that its composite
    mode is the last."""
    bound = cute.size(tensor, mode=[row_mode])
    rows = tensor[(None,) * (cute.rank(tensor) - 1) + ((bound, end),)]
    return cute.domain_offset(
        (0,) * row_mode + (bound - count,) + (0,) * (cute.rank(rows) - 1 - row_mode), rows
    )


def makes_lengths(argument) -> bool:
    """Whether an argument of upstream's method is what makes its sequence lengths."""
    return isinstance(argument, partial) and argument.func is SeqlenInfoQK.create


def queries_of(tensor: cute.Tensor, row_mode: int, info: SeqlenInfoQK) -> cute.Tensor:
    return rows_of(tensor, row_mode, info.offset_q + info.seqlen_q, info.seqlen_q)


def keys_of(tensor: cute.Tensor, row_mode: int, info: SeqlenInfoQK) -> cute.Tensor:
    return rows_of(tensor, row_mode, info.offset_k + info.seqlen_k, info.seqlen_k)


@cute.jit
def clear_rows(tensor: cute.Tensor, first: Int32, last: Int32, place: Int32, places: Int32):
    """Writes zeros to the rows [first, last) of a tensor [total, heads, head_dim], with all threads
    of the CTA.

    Several CTAs may share the rows: this one has the `place` of `places`.
    """
    thread, _, _ = cute.arch.thread_idx()
    threads, _, _ = cute.arch.block_dim()
    zeros = cute.make_rmem_tensor(TMA_ALIGN, tensor.element_type)
    zeros.fill(0.0)
    vectors = tensor.shape[2] // TMA_ALIGN
    for row in cutlass.range(first + place, last, places, unroll=1):
        for i in cutlass.range(thread, tensor.shape[1] * vectors, threads, unroll=1):
            pointer = tensor.iterator + cute.crd2idx(
                (row, i // vectors, i % vectors * TMA_ALIGN), tensor.layout
            )
            cute.autovec_copy(
                zeros, cute.make_tensor(pointer.align(16), cute.make_layout(TMA_ALIGN))
            )


@cute.jit
def clear_outside(tensor: cute.Tensor, offsets: Offsets):
    """Writes zeros before the first sequence and behind the last one, with all CTAs of the grid. A
    tensor may have no rows."""
    if offsets.total > 0:
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        first = offsets[0]
        clear_rows(tensor, Int32(0), first, cta, num_ctas)
        last = cutlass.max(offsets[offsets.shape[0] - 1], first)
        clear_rows(tensor, last, offsets.total, cta, num_ctas)


def assume_tensor_aligned(tensor: cute.Tensor | None) -> cute.Tensor | None:
    """Tells the compiler that every stride but the last is a multiple of 16 bytes. It stands in for
    upstream's function, which takes no mode of modes."""
    if tensor is None:
        return None
    elements = 128 // tensor.element_type.width

    def aligned(stride):
        if isinstance(stride, tuple):
            return tuple(map(aligned, stride))
        return stride if isinstance(stride, int) else cute.assume(stride, divby=elements)

    *strides, last = tensor.stride
    return cute.make_tensor(
        tensor.iterator, cute.make_layout(tensor.shape, stride=(*map(aligned, strides), last))
    )


@dataclass
class Decoder(VarlenDecoder):
    """A sequence that ends before it begins has no tiles; upstream would count less than none."""

    @cute.jit
    def _num_m_blocks(self, lane: Int32, bidb_start: Int32) -> Int32:
        return cutlass.max(VarlenDecoder._num_m_blocks(self, lane, bidb_start), 0)


class Scheduler(SingleTileVarlenScheduler):
    """Upstream's scheduler for sequences that are given as `Offsets`. These know the number of
    rows, which a tensor that `sequences` made does not say."""

    @staticmethod
    def to_underlying_arguments(args, **options):
        params = SingleTileVarlenScheduler.to_underlying_arguments(
            replace(args, total_q=args.mCuSeqlensQ.total), **options
        )
        return replace(params, decoder=as_subclass(Decoder, params.decoder))
