"""Which query tiles a key block is seen by, and what of their scores is hidden, in the second pass
of the backward: a window's bounds say so. With a bias lists do, and kernels/sm90/key_lists.py takes
the place of this."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from quack import layout_utils

from kernels.kernel import Kernel, Mask
from kernels.sm90.masks import Edge, KeyBounds, Masks
from kernels.sm90.warpgroups import ROWS
from kernels.sm90.window import Window


class Tile(NamedTuple):
    """What a CTA works on."""

    row: Int32  # its first key, of its sequence
    head: Int32  # of keys and values
    batch: Int32  # varlen: 0
    rows: Int32  # queries of the sequence
    keys: Int32
    end_q: Int32  # varlen: the row of q after the sequence's last
    end_k: Int32
    # Query tiles of a head that see any of the keys, [begin, end). With a bias all of them, because
    # each head has a list of its own.
    begin: Int32
    end: Int32
    free_begin: Int32  # those whose every query sees all the keys, [free_begin, free_end)
    free_end: Int32
    heads: Int32  # of queries
    # The CTAs of a cluster divide the query tiles of all heads. This one skips so many, which come
    # before its own, and has so many steps. With a bias lists say so.
    skipped: Int32
    steps: Int32

    def query_head(self, place) -> Int32:
        return self.head * self.heads + place.head


class Place(NamedTuple):
    """The query tile at hand."""

    head: Int32  # of the group
    tile: Int32


class KeyMasks:
    def __init__(self, kernel: Kernel):
        self.masks = Masks(kernel, ROWS)
        self.causal, self.window = kernel.mask is Mask.CAUSAL, kernel.mask is Mask.WINDOW
        self.bounded = self.causal or self.window
        # What query tiles may have, each of which has code of its own.
        self.edges: tuple[Edge | None, ...] = (None, Edge(left=True)) if self.bounded else (None,)
        # Whether key blocks cost more the earlier they are.
        self.uneven = self.causal

    @cute.jit
    def query_tiles(self, row: Int32, rows: Int32, keys: Int32, window: Window):
        """Which query tiles see keys from `row` on, [begin, end), and which of them see all of
        these keys, [free_begin, free_end)."""
        begin, end = Int32(0), cute.ceil_div(rows, ROWS)
        free_begin, free_end = begin, end
        if const_expr(self.bounded):
            # A key is seen by the queries from `right` before its own position to `left` behind.
            first_key, last_key = row + rows - keys, cutlass.min(row + ROWS, keys) - 1 + rows - keys
            first = cutlass.max(first_key - window.right, 0)
            free_begin = cute.ceil_div(cutlass.max(last_key - window.right, 0), ROWS)
            end_query = rows
            if const_expr(self.window):
                end_query = cutlass.min(last_key + window.left + 1, rows)
                free_end = cutlass.max(first_key + window.left + 1, 0) // ROWS
            begin = first // ROWS if first < end_query else 0
            end = cute.ceil_div(end_query, ROWS) if first < end_query else 0
        return begin, end, free_begin, free_end

    # The query tiles one after the other

    def first(self, tile: Tile, window: Window) -> Place:
        of_head = cutlass.max(tile.end - tile.begin, 1)
        return Place(tile.skipped // of_head, tile.begin + tile.skipped % of_head)

    def steps(self, tile: Tile, window: Window) -> Int32:
        """The number of query tiles, of all heads."""
        return tile.steps

    @cute.jit
    def following(self, tile: Tile, place: Place, window: Window) -> Place:
        last = place.tile + 1 == tile.end
        return Place(place.head + 1 if last else place.head, tile.begin if last else place.tile + 1)

    def number(self, tile: Tile, place: Place, window: Window) -> Int32:
        """The number of the query tile at hand."""
        return place.tile

    @cute.jit
    def has(self, edge: cutlass.Constexpr, tile: Tile, place: Place):
        """Whether the query tile at hand has an edge, one of those before the last of `edges`. With
        None every query sees every key."""
        return place.tile >= tile.free_begin and place.tile < tile.free_end

    # The scores

    @cute.jit
    def bounds(self, tile: Tile, window: Window, thread, mma_scores, ring: None) -> KeyBounds:
        """Which queries the keys of a thread's rows are seen by, as Masks takes it."""
        where = mma_scores.get_slice(thread).partition_C(cute.make_identity_tensor((ROWS, ROWS)))
        where = layout_utils.reshape_acc_to_mn(where)
        first, end = [], []
        for r in cutlass.range_constexpr(2):
            place = tile.row + where[r, 0][0] + tile.rows - tile.keys - where[0, 0][1]
            first.append(place - window.right)
            end.append(place + window.left + 1 if self.window else tile.rows)
        return KeyBounds(tuple(first), tuple(end), Int32(0), Int32(0), Int32(0))

    def fetch(self, place: Place, bounds: KeyBounds, edge: Edge | None) -> None:
        """Reads what `mask` needs of memory: nothing. It may stand between the issue of a product
        and the wait for it."""

    @cute.jit
    def mask(
        self, scores, place: Place, bounds: KeyBounds, edge: cutlass.Constexpr, window, fetched
    ):
        """Hides the scores of queries that do not see the keys of a thread's rows."""
        if const_expr(edge is not None):
            self.masks.mask(scores, place.tile, bounds, edge, window, None)

    # What memory holds of a mask comes to shared memory: nothing.

    def shared_elements(self) -> int:
        return 0

    def shared_barriers(self) -> int:
        return 0

    def ring(self, elements, barriers) -> None:
        """What of shared memory the other methods take."""

    def load(self, tile: Tile, window: Window, ring: None, part: Int32) -> None:
        """One of PARTS warps does it."""
