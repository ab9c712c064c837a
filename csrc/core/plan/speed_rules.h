// PyTorch's flash attention and cuDNN, the stock kernels, were measured to run some problems faster
// than ours: kernels/speed_rules.csv.
#pragma once

#include <vector>

#include "kernel_table.h"
#include "problem.h"
#include "problem_features.h"

namespace fa4 {

// Where one of these rules holds, its peer's kernel was faster on some measured problem, and ours
// on next to none. The vector is never destroyed, because a call may read it while the process
// exits.
extern const std::vector<Rule>& kSpeedRules;

// Returns whether PyTorch's flash attention can run the problem and computes what our kernels
// compute. Only then may the faster one of the two be chosen, because another call may run the
// other half of forward and backward. No rule leaves to cuDNN what flash would disagree on. `left`
// and `right` are the window in force.
bool stock_agrees(const Problem& problem, int32_t left, int32_t right);

// Returns whether PyTorch's kernel can read the problem's bias, if it has one. cuDNN reads
// misaligned addresses where the bias is broadcast over the keys, or has its keys apart, which ends
// the CUDA context.
bool stock_reads_bias(const Problem& problem);

// Returns a reason to leave the problem to its peer's kernel although `kernel` could run it, or
// null.
const char* stock_is_faster(const Problem& problem, const Kernel& kernel, Features features,
                            const std::vector<Rule>& rules = kSpeedRules);

}  // namespace fa4
