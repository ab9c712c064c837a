"""What our own SM90 backwards have in common: what they load, which tile a CTA works on, how they
take a row's logsumexp, and how dK and dV are stored. Each CTA has one tile."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from flash_attn.cute import utils

from kernels.common.tile_slots import Place
from kernels.sm90 import staging
from kernels.sm90.key_tiles import KeyTile
from kernels.sm90.output import Destination, Output
from kernels.sm90.softmax import LOG2_E
from kernels.sm90.staging import Load
from kernels.sm90.warpgroups import WARP

# Heads whose rows take this many bytes are in work at a time: what a CTA reads block by block then
# stays in L2, which has 50 MB, beside what is read and written once.
IN_L2 = 32 << 20
# A large bias makes a logsumexp that is farther from zero than this. fp32 rounds it to eighths or
# coarser, so probabilities computed from it may be off by 6% or more, or infinite.
FARTHEST_LOGSUMEXP = 2.0**20


@dataclass(frozen=True)
class Loads:
    q: Load
    k: Load
    v: Load
    dout: Load


class Gradient(NamedTuple):
    """A tile of dK or dV, as Output takes one. Output's rows are queries, so these fields have the
    names of queries, but hold the keys and their end."""

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
def zero_after_exponentials(exponentials: cute.Tensor) -> Int32:
    """Zero, which is known once all the exponentials are: none is minus zero. Where products wait
    for it, the compiler cannot compute exponentials between them, which would stretch a turn."""
    words, bits = cute.recast_tensor(exponentials, Int32), Int32(0)
    for i in cutlass.range_constexpr(cute.size(words)):
        bits = bits | words[i]
    return Int32(bits == -(1 << 31))


@cute.jit
def zero_after_products(products: cute.Tensor) -> Int32:
    """Zero, which is known once all the products are: none is a NaN with all bits set, because
    arithmetic makes none with a sign. What it releases stands before the wait for the tensor cores,
    and the compiler would else compute the products after that wait."""
    words = cute.recast_tensor(products, Int32)
    bits = words[0]
    for i in cutlass.range_constexpr(1, cute.size(words)):
        bits = bits & words[i]
    return Int32(bits == -1)


@cute.jit
def store_gradient(output: Output, tile: KeyTile, row, thread, sums: cute.Tensor, scale, gradient):
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
