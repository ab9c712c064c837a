"""Numbers of the hardware's named barriers, of which a CTA has 16."""

from enum import IntEnum


class Barrier(IntEnum):
    CTA = 0  # all threads: cute.arch.sync_threads
    # A consuming warpgroup's own. In the forward, whose warpgroups pingpong, it says that it is the
    # warpgroup's turn to issue products.
    WARPGROUP_1 = 1
    WARPGROUP_2 = 2
    WARPGROUP_3 = 3
