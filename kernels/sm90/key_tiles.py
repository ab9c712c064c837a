"""The key blocks that the CTAs of a backward work on, where each has all query heads of its
keys."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32
from quack.cute_dsl_utils import ParamsBase

from kernels.common import tile_slots
from kernels.common.packed import Offsets


class Sizes(NamedTuple):
    """What the tiles of a grid have in common."""

    rows: Int32  # queries and keys, varlen: of all sequences
    keys: Int32
    heads_kv: Int32
    ratio: Int32  # query heads of a key/value head
    blocks: Int32  # key blocks of a head; varlen: as many as there may be
    heads: Int32  # key/value heads, dense: of all batch elements
    together: Int32  # dense: heads whose key blocks are worked on together

    @classmethod
    def of(
        cls,
        q: cute.Tensor,
        k: cute.Tensor,
        offsets_k: Offsets | None,
        block_n: int,
        together: Int32,
    ):
        """The sizes of tensors as the caller gave them."""
        *leading, heads, _ = q.shape
        rows, keys, heads_kv = leading[-1], k.shape[-3], k.shape[-2]
        if offsets_k is None:
            blocks, all_heads = cute.ceil_div(keys, block_n), heads_kv * leading[0]
        else:
            blocks, all_heads = tile_slots.packed_slots(offsets_k, block_n), heads_kv
        return cls(rows, keys, heads_kv, heads // heads_kv, blocks, all_heads, together)


@dataclass
class KeyTile(ParamsBase):
    """What a CTA works on."""

    row: Int32  # its first key, of its sequence
    head: Int32  # of keys and values
    batch: Int32  # varlen: 0
    rows: Int32  # queries of the sequence
    keys: Int32  # varlen: 0 where the CTA has no tile
    end_q: Int32  # varlen: the row of q after the sequence's last
    end_k: Int32
    # Query tiles of a head that see any of the keys, [begin, end). With a bias all of them, because
    # each head has a list of its own.
    begin: Int32
    end: Int32
    heads: Int32  # of queries

    def query_head(self, head: Int32) -> Int32:
        """A head of the group, among all heads."""
        return self.head * self.heads + head
