// Problems that the stock kernel runs faster than ours, as measured. The rules are data:
// benchmarks/fit_speed_rules.py writes them.
#pragma once

#include "kernel_table.h"
#include "problem.h"

namespace fa4 {

// Whether PyTorch's flash attention can run the problem, and computes what our kernels compute:
// only then may the faster one of the two be chosen, since another call may run the other half of
// forward and backward. `left`, `right`: the window in force.
bool stock_agrees(const Problem& problem, int32_t left, int32_t right);

// A reason to leave the problem, which `kernel` would run, to the stock kernel; or null.
const char* stock_is_faster(const Problem& problem, const Kernel& kernel);

}  // namespace fa4
