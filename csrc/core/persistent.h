// How the tiles of a persistent forward come to its thread blocks (kernels/sm90/tiles.py has the order).
#pragma once

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// Whether the kernel can number the tiles in int32.
bool fits_cursors(const Problem& problem, const Kernel& kernel);

// Dense: heads, of all batch elements, whose tiles are dealt out in pairs of a long and a short one, before the others' longest
// first.
int32_t paired_heads(const Problem& problem, const Kernel& kernel, int32_t workers);

}  // namespace fa4
