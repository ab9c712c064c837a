"""Numbers of the hardware's named barriers, of which a CTA has 16."""

from enum import IntEnum


class Barrier(IntEnum):
    CTA = 0  # all threads: cute.arch.sync_threads
    # There is one per consuming warpgroup. In a forward with pingpong it says that it is this
    # warpgroup's turn to issue products. Without pingpong the warpgroup's own threads wait for each
    # other at it.
    WARPGROUP_1 = 1
    WARPGROUP_2 = 2
    WARPGROUP_3 = 3
