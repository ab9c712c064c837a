"""Before a backward with a bias: lists for each key block the query tiles that see any of its keys,
from the kinds of cells that kernels/sm90/map_queries.py leaves. Both have 64 rows, as a cell
has."""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Int32

from kernels.common import symbolic
from kernels.kernel import Kernel
from kernels.sm90 import lists as tile_lists
from kernels.sm90.bias import CELL
from kernels.sm90.warpgroups import WARP


class MapKeys(tile_lists.Lister):
    def __init__(self, kernel: Kernel):
        if (kernel.block_m, kernel.block_n) != (CELL, CELL):
            raise ValueError(f"block_m and block_n of {kernel.name} must be {CELL}")

    @cute.jit
    def __call__(self, cells: cute.Tensor, lists: cute.Tensor, stream: cuda.CUstream):
        batch, heads, blocks, _ = lists.shape
        self.kernel(cells, lists).launch(
            grid=[blocks * heads * batch, 1, 1], block=[WARP, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, cells: cute.Tensor, lists: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()
        _, heads, blocks, _ = lists.shape
        block, head, batch = cta % blocks, cta // blocks % heads, cta // blocks // heads
        self.write(cells, lists, tile_lists.List(batch, head, block, tiles=cells.shape[2]))

    def kind(self, cells: cute.Tensor, of: tile_lists.List, tile: Int32) -> Int32:
        """The kind of a query tile, which is a cell."""
        return cells[of.batch, of.head, tile, of.index]


def entry(kernel: Kernel):
    return MapKeys(kernel), symbolic.arguments(kernel)
