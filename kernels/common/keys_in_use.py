"""Packed keys and values for the forward, each sequence ending where its keys in use end, for TMA too.

Upstream reads packed keys as one long tensor: a sequence's last tile goes on into the next sequence, or into cache rows that are
not in use. Their probabilities are zero, but zero times a NaN there is NaN. Here TMA sees a sequence's rows as the last ones before
a bound, and fills with zeros what lies beyond it.
"""

from dataclasses import dataclass, fields
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from flash_attn.cute.seqlen_info import SeqlenInfoQK
from quack import copy_utils

from kernels.common.arguments import TMA_ALIGN


def sequences(packed: cute.Tensor) -> cute.Tensor:
    """[total, heads, head_dim] as [(2^30, row after a sequence's last), 2^30, heads, head_dim], the sequence's rows being the last.

    A view with one mode less would begin far below the tensor, and TMA faults there when a load lies out of bounds altogether.
    """
    view = copy_utils.create_ragged_tensor_for_tma(packed, ragged_dim=0)
    rows, heads, head_dim, *after = zip(view.shape, view.stride, strict=True)
    shape, stride = zip(tuple(zip(*after, strict=True)), rows, heads, head_dim, strict=True)
    return cute.make_tensor(view.iterator, cute.make_layout(shape, stride=stride))


def assume_tensor_aligned(tensor: cute.Tensor | None) -> cute.Tensor | None:
    """In place of upstream's, which takes no mode of modes."""

    def aligned(stride):
        if isinstance(stride, tuple):
            return tuple(map(aligned, stride))
        return stride if isinstance(stride, int) else cute.assume(stride, divby=TMA_ALIGN)

    if tensor is None:
        return None
    *strides, last = tensor.stride
    return cute.make_tensor(tensor.iterator, cute.make_layout(tensor.shape, stride=(*map(aligned, strides), last)))


@cute.jit
def length(lengths: cute.Tensor, batch_idx: Int32) -> Int32:
    result = lengths[0, batch_idx + 1] - lengths[0, batch_idx]
    if cute.size(lengths, mode=[0]) > 1:
        result = lengths[1, batch_idx]
    return result


@dataclass(frozen=True)
class SeqlenInfo(SeqlenInfoQK):
    def rows_of(self, tensor: cute.Tensor, row_mode: int) -> cute.Tensor:
        """This sequence of a tensor of `sequences`, whose last mode is the row after."""
        bound = cute.size(tensor, mode=[row_mode])
        rows = tensor[(None,) * (cute.rank(tensor) - 1) + ((bound, self.offset_k + self.seqlen_k),)]
        return cute.domain_offset((0,) * row_mode + (bound - self.seqlen_k,) + (0,) * (cute.rank(rows) - 1 - row_mode), rows)

    def offset_batch_K(self, mK, batch_idx, dim, **_):
        return self.rows_of(mK, 0)


def create(batch_idx: Int32, mSeqUsedK: cute.Tensor, **given) -> SeqlenInfo:
    """mSeqUsedK: `key_lengths` of kernels/common/arguments.py, for which upstream has this place."""
    info = SeqlenInfoQK.create(batch_idx, **given)
    found = {field.name: getattr(info, field.name) for field in fields(info)}
    return SeqlenInfo(**found | {"offset_k": mSeqUsedK[0, batch_idx], "seqlen_k": length(mSeqUsedK, batch_idx)})


class Sequences:
    """A tensor of `sequences` for code that indexes it by head and sequence, right after asking for that sequence's lengths."""

    def __init__(self, tensor: cute.Tensor, row_mode: int):
        self.tensor, self.row_mode, self.shape = tensor, row_mode, tensor.shape

    def __getitem__(self, index):
        *rest, _ = index
        return self.info.rows_of(self.tensor, self.row_mode)[tuple(rest)]


def with_keys_in_use(arguments, *tensors: Sequences):
    """A method's arguments, with what makes upstream's sequence lengths replaced by what makes ours, and tells the tensors."""

    def replaced(argument):
        if not (isinstance(argument, partial) and argument.func is SeqlenInfoQK.create):
            return argument

        def create_and_tell(batch_idx):
            info = create(batch_idx, **argument.keywords)
            for tensor in tensors:
                tensor.info = info
            return info

        return create_and_tell

    if isinstance(arguments, dict):
        return {name: replaced(argument) for name, argument in arguments.items()}
    return [replaced(argument) for argument in arguments]


def block_to_load(block: Int32) -> Int32:
    """A tile of queries that sees no keys loads the block before the first all the same, which TMA's view does not bound."""
    return cutlass.max(block, 0)
