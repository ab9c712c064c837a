"""Packed sequences for upstream's code, which asks where a sequence is and then takes its rows from
the whole tensor.

Upstream's code is given `Rows`, which hold tensors of `packed.sequences`, in place of tensors. The
function that makes its sequence lengths also tells these `Rows` where the sequence is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from flash_attn.cute.seqlen_info import SeqlenInfoQK

from kernels.common import packed
from kernels.common.packed import KeyLengths


class Rows:
    """A tensor of which upstream's code sees the rows of one sequence alone."""

    def __init__(self, tensor: cute.Tensor, row_mode: int, of_keys: bool):
        self.tensor, self.row_mode, self.shape = tensor, row_mode, tensor.shape
        self.rows_of = packed.keys_of if of_keys else packed.queries_of

    def tell(self, info: SeqlenInfoQK) -> None:
        self.info = info

    @property
    def rows(self) -> cute.Tensor:
        return self.rows_of(self.tensor, self.row_mode, self.info)


class OffsetRows(Rows):
    """Serves code that offsets the tensor by the sequence's first row, which is row 0 here."""

    def tell(self, info: SeqlenInfoQK) -> None:
        super().tell(info)
        self.told = super().rows

    @property
    def iterator(self):
        return self.told.iterator

    @property
    def layout(self):
        return self.told.layout

    def __getitem__(self, index):
        return self.told[index]


class IndexedRows(Rows):
    """Serves code that indexes the tensor by head and, last, by sequence."""

    def __getitem__(self, index):
        *rest, _ = index
        return self.rows[tuple(rest)]


@dataclass(frozen=True)
class KeysInUse(SeqlenInfoQK):
    """A sequence whose keys in use are known, for the forward."""

    def offset_batch_K(self, mK, batch_idx, dim, **_):
        return packed.keys_of(mK, 0, self)

    @staticmethod
    def create(batch_idx: Int32, mSeqUsedK: KeyLengths, **given) -> "KeysInUse":
        """`mSeqUsedK`, upstream's parameter for seqused_k, carries all that is known of the keys:
        these lengths, or PagedKeys."""
        info = SeqlenInfoQK.create(batch_idx, **given)
        begin, keys = mSeqUsedK.place(batch_idx)
        return packed.as_subclass(KeysInUse, info, offset_k=begin, seqlen_k=keys)


@dataclass(frozen=True)
class Loaded(SeqlenInfoQK):
    """The place of a sequence that the backward loads from `OffsetRows`."""

    def offset_batch_Q(self, tensor, batch_idx, dim, padded=False, **options):
        if padded:  # lse and delta, in the workspace
            return super().offset_batch_Q(tensor, batch_idx, dim, padded=True, **options)
        return tensor

    def offset_batch_K(self, tensor, batch_idx, dim, **_):
        return tensor

    @staticmethod
    def of(info: SeqlenInfoQK) -> "Loaded":
        return packed.as_subclass(Loaded, info, offset_q=0, offset_k=0)


def telling(
    argument,
    *tensors: Rows,
    create: Callable[..., SeqlenInfoQK] = SeqlenInfoQK.create,
    given: Callable[[SeqlenInfoQK], SeqlenInfoQK] = lambda info: info,
):
    """Returns an argument of upstream's method unchanged, unless it is the function that makes
    sequence lengths. That one is replaced by a function that makes them with `create`, tells them
    to `tensors`, and returns `given(lengths)`."""
    if not packed.makes_lengths(argument):
        return argument

    def create_and_tell(batch_idx):
        info = create(batch_idx, **argument.keywords)
        for tensor in tensors:
            tensor.tell(info)
        return given(info)

    return create_and_tell


def block_to_load(block: Int32) -> Int32:
    """For a query tile that sees no keys upstream loads key block -1, which TMA's bound does not
    exclude; this loads block 0."""
    return cutlass.max(block, 0)
