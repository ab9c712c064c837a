// Problems that the stock kernel was measured to run faster than ours: kernels/speed_rules.csv.
#pragma once

#include <vector>

#include "kernel_table.h"
#include "problem.h"
#include "problem_features.h"

namespace fa4 {

// Where one of them holds, the stock kernel was faster on some problem, and ours on next to none.
// The vector is never destroyed: a call reads it while the process exits.
extern const std::vector<Rule>& kSpeedRules;

// Whether PyTorch's flash attention can run the problem, and computes what our kernels compute:
// only then may the faster one of the two be chosen, since another call may run the other half of
// forward and backward. `left`, `right`: the window in force.
bool stock_agrees(const Problem& problem, int32_t left, int32_t right);

// A reason to leave the problem, which `kernel` would run, to the stock kernel; or null.
const char* stock_is_faster(const Problem& problem, const Kernel& kernel);

}  // namespace fa4
