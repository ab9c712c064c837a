"""What our own SM90 backwards have in common: what they load, which tile a CTA works on, how they
take a row's logsumexp, and how dK and dV are stored. Each CTA has one tile."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from flash_attn.cute import utils

from kernels.common import tile_slots
from kernels.common.packed import Offsets
from kernels.common.tile_slots import Place
from kernels.sm90 import staging
from kernels.sm90.output import Destination, Output
from kernels.sm90.softmax import LOG2_E
from kernels.sm90.staging import Load
from kernels.sm90.warpgroups import WARP

# Heads whose rows take this many bytes are in work at a time: what a CTA reads block by block then
# stays in L2, which has 50 MB, beside what is read and written once.
IN_L2 = 32 << 20
# A logsumexp farther from zero than this is rounded to sixteenths or more, because of a large bias.
# Probabilities computed from it would be wrong by 4% or more, or infinite.
FARTHEST_LOGSUMEXP = 2.0**20


@dataclass(frozen=True)
class Loads:
    q: Load
    k: Load
    v: Load
    dout: Load


class Sizes(NamedTuple):
    """What the tiles of a grid have in common, where they are key blocks."""

    rows: Int32  # queries and keys, varlen: of all sequences
    keys: Int32
    heads_kv: Int32
    ratio: Int32  # query heads of a key/value head
    blocks: Int32  # key blocks of a head; varlen: as many as there may be
    heads: Int32  # key/value heads, dense: of all batch elements
    together: Int32  # dense: heads whose key blocks are worked on together

    @classmethod
    def of(
        cls, q: cute.Tensor, k: cute.Tensor, offsets_k: Offsets | None, block_n: int,
        together: Int32,
    ):  # fmt: skip
        """The sizes of tensors as the caller gave them."""
        *leading, heads, _ = q.shape
        rows, keys, heads_kv = leading[-1], k.shape[-3], k.shape[-2]
        if offsets_k is None:
            blocks, all_heads = cute.ceil_div(keys, block_n), heads_kv * leading[0]
        else:
            blocks, all_heads = tile_slots.packed_slots(offsets_k, block_n), heads_kv
        return cls(rows, keys, heads_kv, heads // heads_kv, blocks, all_heads, together)


class Gradient(NamedTuple):
    """The rows of dK or dV, as Output takes them."""

    head: Int32
    batch: Int32
    rows: Int32
    end_q: Int32


def heads_in_l2(rows, bytes_of_row):
    """How many heads of so many rows are in work at a time."""
    return cutlass.max(IN_L2 // bytes_of_row // cutlass.max(rows, 1), 1)


@cute.jit
def dense_place(cta: Int32, tiles: Int32, heads: Int32, together: Int32) -> Place:
    """The place of a dense tensor's tile. Heads are in work in sections of `together`. A section
    begins with the first tile of each of its heads, so a kernel that counts the costliest tile as
    the first has LPT order in every section."""
    together = cutlass.min(together, heads)
    section, rest = cta // (tiles * together), cta % (tiles * together)
    first = section * together
    heads = cutlass.min(heads - first, together)
    return Place(first + rest % heads, rest // heads, tiles, Int32(0))


@cute.jit
def base_2(lse: Float32, biased: cutlass.Constexpr = False) -> Float32:
    """A row's logsumexp in base 2. That of a row without keys, minus infinity, becomes plus
    infinity, which makes its probabilities zero. With a bias, so does one that says nothing of the
    scores."""
    none = lse == -Float32.inf
    if const_expr(biased):
        none = lse < -FARTHEST_LOGSUMEXP or lse > FARTHEST_LOGSUMEXP
    return Float32.inf if none else lse * LOG2_E


@cute.jit
def zero_after(exponentials: cute.Tensor) -> Int32:
    """Zero, which is known once all the exponentials are: none is minus zero. Where products wait
    for it, the compiler cannot compute exponentials between them, which would stretch a turn."""
    words, bits = cute.recast_tensor(exponentials, Int32), Int32(0)
    for i in cutlass.range_constexpr(cute.size(words)):
        bits = bits | words[i]
    return Int32(bits == -(1 << 31))


@cute.jit
def store_gradient(output: Output, tile, row, thread, sums: cute.Tensor, scale, gradient):
    """Stores a warpgroup's rows of dK or dV, from `row` on. They are keys of the tile."""
    sums.store(sums.load() * scale)
    result = cute.make_rmem_tensor_like(sums, output.dtype)
    utils.cvt_f16(sums, result)
    output.write_from_registers(
        Gradient(tile.head, tile.batch, tile.keys, tile.end_k),
        row + cute.arch.make_warp_uniform(thread // WARP) * output.warp_rows,
        result,
        Destination(staging.by_head(gradient), None, None, None),
    )
