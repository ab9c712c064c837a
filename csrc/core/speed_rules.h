// Problems that the stock kernel runs faster than ours, as measured. The rules are data: benchmarks/fit_speed_rules.py writes them.
#pragma once

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// A reason to leave the problem, which `kernel` would run, to the stock kernel; or null.
const char* stock_is_faster(const Problem& problem, const Kernel& kernel);

}  // namespace fa4
