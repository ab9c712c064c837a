// The second pass of a backward: over how many CTAs it divides the query tiles that see the same
// keys.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// One, but where key blocks are too few for the SMs: mostly where few key/value heads serve many
// query heads.
int32_t backward_splits(const Problem& problem, const Kernel& kernel);

}  // namespace fa4
