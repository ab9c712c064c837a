"""How the persistent forward's warps learn what their CTA works on: one warp finds the tiles and
leaves them in a ring in shared memory, so that the others spend neither time nor registers on it.

kernels/sm90/tiles.py has the order. The tiles of a dense tensor are known beforehand, and so is
each CTA's share of them. The tiles of packed sequences differ too much in cost for that: a CTA
takes the next one in line when it has room for one, by a counter in memory.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr, pipeline
from flash_attn.cute import utils
from flash_attn.cute.pipeline import PipelineAsync

from kernels.common import packed, pages
from kernels.common.packed import KeyLengths, Offsets
from kernels.common.pages import Table
from kernels.kernel import Kernel, Layout, Mask
from kernels.sm90 import staging, tiles
from kernels.sm90.bias import ALL
from kernels.sm90.tiles import RING
from kernels.sm90.warpgroups import WARP

WORDS = 4  # int32 that are read together
# After a tile of at least this many key blocks, the next tile is taken only once that tile has
# begun, because another CTA may be free earlier. This is 1.03 to 1.10 times as fast as taking the
# next tile ahead after tiles of up to 4 key blocks.
LONG = 2


class Tile(NamedTuple):
    row: Int32  # the first, of its sequence
    head: Int32
    head_kv: Int32
    # Key blocks, [begin, end), at least one; end is 0 where there is no tile. With a bias they are
    # positions in the tile's list.
    begin: Int32
    end: Int32
    batch: Int32  # varlen: 0
    rows: Int32  # of the sequence
    keys: Int32
    end_q: Int32  # varlen: the row of q after the sequence's last
    end_k: Int32  # varlen: the same of k; paged: the sequence's row of the block table


class Sequence(NamedTuple):
    """A sequence in each lane of the warp."""

    rows: Int32
    keys: Int32
    end_q: Int32
    end_k: Int32


class Divisors(NamedTuple):
    query_tiles: cute.FastDivmodDivisorV2  # of a head
    units: cute.FastDivmodDivisorV2  # of a head (tiles.units)
    rest: cute.FastDivmodDivisorV2  # heads that are not paired
    heads: cute.FastDivmodDivisorV2
    ratio: cute.FastDivmodDivisorV2  # query heads of a key/value head


class Dense(NamedTuple):
    rows: Int32
    keys: Int32
    paired_heads: Int32
    end: Int32  # of the cursors
    divisors: Divisors

    @property
    def sequence(self):
        """What every tile says of its sequence."""
        return self.rows, self.keys, self.rows, self.keys


class Varlen(NamedTuple):
    offsets_q: Offsets
    key_lengths: KeyLengths | Table
    heads: Int32
    heads_kv: Int32
    # one int32, zero before the launch: tiles taken beyond each CTA's first
    counter: cute.Tensor


@dataclass(frozen=True)
class Ring:
    """Tiles on their way from the warp that finds them to the others."""

    pipeline: PipelineAsync
    words: cute.Tensor  # [words of a tile, stages]


@cute.jit
def choose(condition, a, b):
    return a if condition else b


def largest(value: Int32) -> Int32:
    return cute.arch.warp_redux_sync(value, "max")


class Schedule:
    def __init__(self, kernel: Kernel):
        self.tile_m, self.tile_n = kernel.block_m, kernel.block_n
        self.causal, self.window = kernel.mask is Mask.CAUSAL, kernel.mask is Mask.WINDOW
        self.biased, self.varlen = kernel.mask is Mask.BIAS, kernel.packed
        self.paged = kernel.layout is Layout.PAGED
        # Those from `rows` on are the same for all tiles of a dense tensor.
        self.fields = len(Tile._fields) if self.varlen else Tile._fields.index("rows")
        self.words = -(-self.fields // WORDS) * WORDS

    def dense(self, rows, keys, heads, heads_kv, batch, paired_heads):
        """The order of a dense tensor's tiles."""
        every_head = heads * batch
        query_tiles = cute.ceil_div(rows, self.tile_m)
        numbers = (
            query_tiles,
            tiles.units(query_tiles),
            cutlass.max(every_head - paired_heads, 1),
            heads,
            heads // heads_kv,
        )
        return Dense(
            rows,
            keys,
            paired_heads,
            tiles.end(every_head, paired_heads, query_tiles),
            Divisors(*map(cute.FastDivmodDivisorV2, numbers)),
        )

    def ring_barriers(self):
        return cute.struct.MemRange[cutlass.Int64, RING * 2]

    def ring_words(self):
        return cute.struct.Align[cute.struct.MemRange[Int32, RING * self.words], 4 * WORDS]

    def ring(self, barriers, words, readers: int) -> Ring:
        """The ring, which `readers` warps read."""
        tiles_in_it = staging.warp_pipeline(barriers, RING, 1, readers)
        return Ring(tiles_in_it, words.get_tensor(cute.make_layout((self.words, RING))))

    @cute.jit
    def read(self, order, ring: Ring, state) -> Tile:
        ring.pipeline.consumer_wait(state)
        found = cute.make_rmem_tensor(self.words, Int32)
        cute.autovec_copy(ring.words[None, state.index], found)
        ring.pipeline.consumer_release(state)
        values = [found[i] for i in range(self.fields)]
        if const_expr(not self.varlen):
            values += order.sequence
        return Tile(*values)

    def no_tile(self) -> Tile:
        return Tile(*(Int32(0),) * len(Tile._fields))

    @cute.jit
    def write(self, tile: Tile, ring, state):
        # The DSL carries every object that a branch writes to through the branch, field by field.
        # So `words` is taken out of the ring here.
        words = ring.words
        ring.pipeline.producer_acquire(state)
        if cute.arch.lane_idx() == 0:
            for i in cutlass.range_constexpr(self.fields):
                words[i, state.index] = tile[i]
        ring.pipeline.producer_commit(state)

    def await_reading(self, ring, state):
        """Waits until the tile that was just written has been read."""
        its_next = state.clone()
        for _ in range(RING):
            its_next.advance()
        ring.pipeline.producer_acquire(its_next)

    @cute.jit
    def run(self, order, visibility, ring: Ring):
        """Finds all tiles of the CTA. One warp does it."""
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, RING)
        if const_expr(self.varlen):
            self.run_varlen(order, visibility, cta, num_ctas, ring, state)
        else:
            self.run_dense(order, visibility, cta, num_ctas, ring, state)

    @cute.jit
    def run_dense(self, order: Dense, visibility, cta, num_ctas, ring, state):
        cursor, flip = tiles.first(cta)
        query_tiles, units, rest, heads, ratio = order.divisors
        while cursor < order.end:
            # A bias may be a causal mask.
            if const_expr(self.causal or self.biased):
                entry, query_tile = tiles.causal(
                    cursor, flip, order.paired_heads, query_tiles.divisor, units, rest, choose
                )
            else:
                entry, query_tile = tiles.full(cursor, query_tiles)
            batch, head = divmod(entry, heads)
            head_kv, _ = divmod(head, ratio)
            row = query_tile * self.tile_m
            begin, end = self.positions(batch, head, query_tile, order.rows, order.keys, visibility)
            self.write(Tile(row, head, head_kv, begin, end, batch, *order.sequence), ring, state)
            state.advance()
            cursor, flip = tiles.following(
                cursor, flip, cta, num_ctas, order.paired_heads, query_tiles.divisor, units, choose
            )
        self.write(self.no_tile(), ring, state)

    @cute.jit
    def run_varlen(self, order: Varlen, visibility, cta, num_ctas, ring, state):
        lane = cute.arch.lane_idx()
        batch, ratio = order.offsets_q.shape[0] - 1, order.heads // order.heads_kv
        # `number` is the tile to work on, counted from the first; `before` is the number of tiles
        # in earlier groups and levels.
        number, before = cta, Int32(0)
        # of the group's first sequence
        begin_q = order.offsets_q[0]
        begin_k = Int32(0) if self.paged else order.key_lengths.offset(0)
        for group in cutlass.range(0, batch, WARP, unroll=1):
            sequence, begin_q, begin_k = self.sequence(order, begin_q, begin_k, group + lane, batch)
            query_tiles = cute.ceil_div(sequence.rows, self.tile_m)
            # Head by head, sequence by sequence, a sequence's costliest tiles first.
            through = utils.warp_prefix_sum(query_tiles * ratio, lane)
            a_head = cute.arch.shuffle_sync(through, WARP - 1)
            last_heads = tiles.last_heads(order.heads_kv, a_head, num_ctas, choose)
            first_heads = order.heads_kv - last_heads
            end = before + first_heads * a_head
            while number < end:
                head_kv, place = (number - before) // a_head, (number - before) % a_head
                lane_of = self.lane_of(through, place)
                place -= cute.arch.shuffle_sync(through - query_tiles * ratio, lane_of)
                query_tile = cute.arch.shuffle_sync(query_tiles, lane_of) - 1 - place // ratio
                number = self.put(
                    order,
                    visibility,
                    query_tile,
                    head_kv * ratio + place % ratio,
                    sequence,
                    lane_of,
                    ring,
                    state,
                )
                state.advance()
            before = end
            # The last heads level by level.
            low, high, each = tiles.levels(
                query_tiles, sequence.rows, sequence.keys, self.tile_m, self.causal, choose
            )
            level = tiles.next_level(tiles.HIGHEST, low, high, largest, choose)
            while level >= 0:
                at_level = tiles.at_level(level, low, high, each, choose)
                through = utils.warp_prefix_sum(at_level, lane)
                total = cute.arch.shuffle_sync(through, WARP - 1)
                end = before + total * last_heads * ratio
                while number < end:
                    head, place = (number - before) // total, (number - before) % total
                    lane_of = self.lane_of(through, place)
                    query_tile = level - low if self.causal else place - (through - at_level)
                    query_tile = cute.arch.shuffle_sync(query_tile, lane_of)
                    number = self.put(
                        order,
                        visibility,
                        query_tile,
                        first_heads * ratio + head,
                        sequence,
                        lane_of,
                        ring,
                        state,
                    )
                    state.advance()
                before = end
                level = tiles.next_level(level, low, high, largest, choose)
        self.write(self.no_tile(), ring, state)

    def lane_of(self, through: Int32, place: Int32) -> Int32:
        """The lane whose sequence holds tile `place`: the first with a prefix sum above `place`."""
        return cute.arch.popc(cute.arch.vote_ballot_sync(through <= place))

    @cute.jit
    def sequence(self, order: Varlen, begin_q: Int32, begin_k: Int32, index: Int32, batch: Int32):
        """Finds the sequences of a group, each in its lane, and where the next group begins.

        Where cu_seqlens decreases, a sequence begins at the largest end of those before it. So no
        two have rows in common, and all of them together have as many tiles as the planner counted.
        """
        if const_expr(self.paged):
            return self.sequence_in_pages(order, begin_q, index, batch)
        end_q, end_k = Int32(0), Int32(0)
        if index < batch:
            end_q = order.offsets_q[index + 1]
            end_k = order.key_lengths.offset(index + 1)
        (first_q, end_q), (first_k, end_k) = (
            self.bounds(begin_q, end_q),
            self.bounds(begin_k, end_k),
        )
        keys = Int32(0)
        if index < batch:
            keys = packed.keys_in_use(order.key_lengths, index, end_k - first_k)
        last = WARP - 1
        next_q, next_k = cute.arch.shuffle_sync(end_q, last), cute.arch.shuffle_sync(end_k, last)
        return Sequence(end_q - first_q, keys, end_q, first_k + keys), next_q, next_k

    @cute.jit
    def sequence_in_pages(self, order: Varlen, begin_q: Int32, index: Int32, batch: Int32):
        """The same where keys lie in pages, and no sequence's begin where those of another end."""
        end_q, keys = Int32(0), Int32(0)
        if index < batch:
            end_q = order.offsets_q[index + 1]
            keys = pages.keys_in_use(order.key_lengths, index)
        first_q, end_q = self.bounds(begin_q, end_q)
        next_q = cute.arch.shuffle_sync(end_q, WARP - 1)
        return Sequence(end_q - first_q, keys, end_q, index), next_q, Int32(0)

    @cute.jit
    def bounds(self, begin: Int32, end: Int32):
        """Where each lane's sequence begins and ends, from the ends as they are given. The first
        lane's begins at `begin`."""
        end = cutlass.max(end, begin)
        for i in cutlass.range_constexpr(int(math.log2(WARP))):
            end = cutlass.max(end, cute.arch.shuffle_sync_up(end, offset=1 << i, mask_and_clamp=0))
        first = cute.arch.shuffle_sync_up(end, offset=1, mask_and_clamp=0)
        return choose(cute.arch.lane_idx() == 0, begin, first), end

    @cute.jit
    def put(
        self,
        order: Varlen,
        visibility,
        query_tile,
        head,
        sequences: Sequence,
        lane_of,
        ring,
        state,
    ) -> Int32:
        """Puts a tile into the ring, and returns the number of the next one."""
        of = Sequence(*(cute.arch.shuffle_sync(value, lane_of) for value in sequences))
        row = query_tile * self.tile_m
        begin, end = self.key_blocks(row, of.rows, of.keys, visibility)
        head_kv = head // (order.heads // order.heads_kv)
        self.write(
            Tile(row, head, head_kv, begin, end, Int32(0), of.rows, of.keys, of.end_q, of.end_k),
            ring,
            state,
        )
        if end - begin >= LONG:
            self.await_reading(ring, state)
        taken = Int32(0)
        if cute.arch.lane_idx() == 0:
            taken = cute.arch.atomic_add(order.counter.iterator.llvm_ptr, Int32(1))
        num_ctas, _, _ = cute.arch.grid_dim()
        return num_ctas + cute.arch.shuffle_sync(taken, 0)

    @cute.jit
    def positions(self, batch, head, query_tile, rows: Int32, keys: Int32, visibility):
        """The key blocks of a dense tensor's query tile, or with a bias the positions in its
        list."""
        begin, end = Int32(0), Int32(0)
        if const_expr(self.biased):
            end = visibility.lists[batch, head, query_tile, ALL]
        else:
            begin, end = self.key_blocks(query_tile * self.tile_m, rows, keys, visibility)
        return begin, end

    @cute.jit
    def key_blocks(self, row: Int32, rows: Int32, keys: Int32, visibility):
        begin, end = Int32(0), cute.ceil_div(keys, self.tile_n)
        if const_expr(self.causal or self.window):
            shift = keys - rows
            last = cutlass.min(row + self.tile_m, rows) - 1
            first_key, end_key = Int32(0), cutlass.min(last + shift + 1, keys)
            if const_expr(self.window):
                first_key = cutlass.max(row + shift - visibility.left, 0)
                end_key = cutlass.min(last + shift + visibility.right + 1, keys)
            begin = choose(end_key > first_key, first_key // self.tile_n, 0)
            end = choose(end_key > first_key, cute.ceil_div(end_key, self.tile_n), 0)
        # Where no row sees a key there is one key block, in which everything is masked.
        return begin, cutlass.max(end, 1)
