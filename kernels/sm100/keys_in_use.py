"""Upstream's forward told which keys are in use, sequence by sequence, and given packed keys and
values as `packed.sequences`."""

from dataclasses import dataclass, fields
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from flash_attn.cute.seqlen_info import SeqlenInfoQK

from kernels.common import packed
from kernels.common.packed import KeyLengths


@dataclass(frozen=True)
class SeqlenInfo(SeqlenInfoQK):
    def offset_batch_K(self, mK, batch_idx, dim, **_):
        return packed.rows_of(mK, 0, self.offset_k + self.seqlen_k, self.seqlen_k)


def create(batch_idx: Int32, mSeqUsedK: KeyLengths, **given) -> SeqlenInfo:
    """Upstream has a place for seqused_k, which `mSeqUsedK` takes with all else that is known of
    the keys."""
    info = SeqlenInfoQK.create(batch_idx, **given)
    found = {field.name: getattr(info, field.name) for field in fields(info)}
    begin = mSeqUsedK.offset(batch_idx)
    keys = packed.keys_in_use(mSeqUsedK, batch_idx, mSeqUsedK.offset(batch_idx + 1) - begin)
    return SeqlenInfo(**found | {"offset_k": begin, "seqlen_k": keys})


class Sequences:
    """A tensor of `packed.sequences` for code that indexes it by head and sequence, right after
    asking where the sequence is."""

    def __init__(self, tensor: cute.Tensor, row_mode: int):
        self.tensor, self.row_mode, self.shape = tensor, row_mode, tensor.shape

    def __getitem__(self, index):
        *rest, _ = index
        info = self.info
        return packed.rows_of(
            self.tensor, self.row_mode, info.offset_k + info.seqlen_k, info.seqlen_k
        )[tuple(rest)]


def with_keys_in_use(arguments, *tensors: Sequences):
    """A method's arguments, with what makes upstream's sequence lengths replaced by what makes
    ours, and tells the tensors."""

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
    """A tile of queries that sees no keys loads the block before the first all the same, which
    TMA's view does not bound."""
    return cutlass.max(block, 0)
