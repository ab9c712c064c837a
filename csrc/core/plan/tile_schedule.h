// How the tiles of a persistent forward come to its thread blocks (kernels/sm90/tiles.py has the
// order).
#pragma once

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// Whether the kernel can number the tiles in int32.
bool fits_cursors(const Problem& problem, const Kernel& kernel);

// The planner's choice for a dense, causal problem.
Dealing deal(const Problem& problem, const Kernel& kernel, int32_t multiprocessors);

// Thread blocks for a dense problem without a mask. Where all tiles cost the same, as few as need
// no more rounds: the others would draw power in the rounds before the last one. A head's last tile
// may have fewer rows and cost less: where the number of thread blocks shares a factor with a
// head's tiles, some never get one, and the others wait for these; the fewest that share none and
// need no more rounds even that out.
int32_t in_turns(const Problem& problem, const Kernel& kernel, int32_t multiprocessors);

}  // namespace fa4
