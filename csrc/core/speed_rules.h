// Problems that the stock kernel runs faster than ours, fitted to measurements (docs/performance.md says how).
#pragma once

#include "problem.h"

namespace fa4 {

// A reason to leave the problem to the stock kernel, or null.
const char* stock_is_faster(const Problem& problem, int block_m, int block_n);

}  // namespace fa4
