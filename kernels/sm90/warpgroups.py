"""The warpgroups that compute: their size, and how those of a CTA take turns."""

import cutlass.cute as cute
from cutlass import const_expr

from kernels.sm90.barriers import Barrier

WARP = 32  # threads
WARPGROUP = 128
WARPS = WARPGROUP // WARP  # of a warpgroup
ROWS = 64  # of a warpgroup: WGMMA's M
WARP_ROWS = ROWS // WARPS
# Four lanes hold a row of an accumulator, each of them two neighbours of every eight columns.
ROW_LANES, PAIR = 4, 2


class Turns:
    """Warpgroups take turns to issue products, so that the products of one are queued at a time,
    while the others compute what lies between products."""

    def __init__(self, warpgroups: int, taken: bool):
        self.warpgroups, self.taken = warpgroups, taken and warpgroups > 1

    @cute.jit
    def begin(self, warpgroup):
        """The first turn is the first warpgroup's."""
        if const_expr(self.taken):  # noqa: SIM102, at compile time, the other at run time
            if warpgroup == 0:
                self._signal(warpgroup)

    def wait(self, warpgroup, known=0):
        """`known` is zero. Where the compiler does not know that, it lets no turn begin before."""
        if const_expr(self.taken):
            cute.arch.barrier(
                barrier_id=Barrier.WARPGROUP_1 + warpgroup + known,
                number_of_threads=2 * WARPGROUP,
            )

    def end(self, warpgroup):
        """It is the next warpgroup's turn."""
        if const_expr(self.taken):
            self._signal((warpgroup + 1) % self.warpgroups)

    def _signal(self, warpgroup):
        cute.arch.barrier_arrive(
            barrier_id=Barrier.WARPGROUP_1 + warpgroup, number_of_threads=2 * WARPGROUP
        )
