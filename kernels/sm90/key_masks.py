"""Which query tiles a key block is seen by, and what of their scores is hidden, in the second pass
of the backward: a window's bounds say so. With a bias lists do, and kernels/sm90/key_lists.py takes
the place of this."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from quack import layout_utils

from kernels.kernel import Kernel, Mask
from kernels.sm90.key_tiles import KeyTile
from kernels.sm90.masks import Edge, KeyBounds, Masks
from kernels.sm90.warpgroups import ROWS
from kernels.sm90.window import Window


@dataclass
class ClusterTile(KeyTile):
    """What a CTA works on where a cluster divides the query tiles of a key block."""

    free_begin: Int32  # query tiles whose every query sees all the keys, [free_begin, free_end)
    free_end: Int32
    # This CTA skips so many query tiles of all heads, which come before its own, and has so many
    # steps. With a bias lists say so.
    skipped: Int32
    steps: Int32


class QueryStep(NamedTuple):
    """The query tile at hand."""

    head: Int32  # of the group
    query_tile: Int32


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

    def first(self, tile: ClusterTile, window: Window) -> QueryStep:
        of_head = cutlass.max(tile.end - tile.begin, 1)
        return QueryStep(tile.skipped // of_head, tile.begin + tile.skipped % of_head)

    def steps(self, tile: ClusterTile, window: Window) -> Int32:
        """The number of query tiles, of all heads."""
        return tile.steps

    @cute.jit
    def following(self, tile: ClusterTile, step: QueryStep, window: Window) -> QueryStep:
        last = step.query_tile + 1 == tile.end
        return QueryStep(
            step.head + 1 if last else step.head, tile.begin if last else step.query_tile + 1
        )

    def number(self, tile: ClusterTile, step: QueryStep, window: Window) -> Int32:
        """The number of the query tile at hand."""
        return step.query_tile

    @cute.jit
    def has(self, edge: cutlass.Constexpr, tile: ClusterTile, step: QueryStep):
        """Whether the query tile at hand has an edge, one of those before the last of `edges`. With
        None every query sees every key."""
        return step.query_tile >= tile.free_begin and step.query_tile < tile.free_end

    # The scores

    @cute.jit
    def bounds(
        self, tile: ClusterTile, window: Window, thread, mma_scores, ring: None
    ) -> KeyBounds:
        """Which queries the keys of a thread's rows are seen by, as Masks takes it."""
        where = mma_scores.get_slice(thread).partition_C(cute.make_identity_tensor((ROWS, ROWS)))
        where = layout_utils.reshape_acc_to_mn(where)
        first, end = [], []
        for r in cutlass.range_constexpr(2):
            query = tile.row + where[r, 0][0] + tile.rows - tile.keys - where[0, 0][1]
            first.append(query - window.right)
            end.append(query + window.left + 1 if self.window else tile.rows)
        return KeyBounds(tuple(first), tuple(end), Int32(0), Int32(0), Int32(0))

    def fetch(self, step: QueryStep, bounds: KeyBounds, edge: Edge | None) -> None:
        """Reads what `mask` needs of memory: nothing. It may stand between the issue of a product
        and the wait for it."""

    @cute.jit
    def mask(
        self, scores, step: QueryStep, bounds: KeyBounds, edge: cutlass.Constexpr, window, fetched
    ):
        """Hides the scores of queries that do not see the keys of a thread's rows."""
        if const_expr(edge is not None):
            self.masks.mask(scores, step.query_tile, bounds, edge, window, None)

    # What memory holds of a mask comes to shared memory: nothing.

    def shared_elements(self) -> int:
        return 0

    def shared_barriers(self) -> int:
        return 0

    def ring(self, elements, barriers) -> None:
        """What of shared memory the other methods take."""

    def load(self, tile: ClusterTile, window: Window, ring: None, part: Int32) -> None:
        """One of PARTS warps does it."""
