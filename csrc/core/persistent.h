// How the tiles of a persistent forward come to its thread blocks (kernels/sm90/tiles.py has the order).
#pragma once

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// Whether the kernel can number the tiles in int32.
bool fits_cursors(const Problem& problem, const Kernel& kernel);

// The planner's choice for a dense, causal problem.
Dealing deal(const Problem& problem, const Kernel& kernel, int32_t multiprocessors);

}  // namespace fa4
