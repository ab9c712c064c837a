// How the tiles of a persistent forward come to its thread blocks (kernels/sm90/tiles.py has the order).
#pragma once

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// Whether the kernel can number the tiles in int32.
bool fits_cursors(const Problem& problem, const Kernel& kernel);

// How a dense, causal problem's tiles are dealt out: the tiles of `paired` heads, of all batch elements, in pairs of a long and a
// short one, then the others' longest first.
struct Dealing {
  int32_t workers;  // thread blocks
  int32_t paired;
};

Dealing deal(const Problem& problem, const Kernel& kernel, int32_t multiprocessors);

}  // namespace fa4
