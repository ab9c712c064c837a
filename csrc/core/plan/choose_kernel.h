// Which compiled kernel runs a problem, or why none does.
#pragma once

#include <string>
#include <vector>

#include "kernel_set.h"
#include "kernel_table.h"
#include "overrides.h"
#include "problem.h"
#include "tile_rules.h"

namespace fa4 {

// The `arch` of the kernels that run on a device; 0 where there are none.
int kernel_arch(int capability);

// A kernel, or the reason why there is none.
struct KernelChoice {
  const Kernel* kernel = nullptr;
  std::string reason;
  bool stock_is_faster = false;      // this alone is the reason
  const Kernel* disabled = nullptr;  // there would be a kernel if this one were not disabled
};

// Visits each rule once, in this order: the default kernel, what only the decode kernel can do, the
// tile rules, the speed rules. The problem must have passed plan()'s checks. Without `speed_rules`
// no problem is refused because the stock kernel is faster. It is as if the build lacked the
// `disabled` kernels, and those that are launched with one of them.
KernelChoice choose_kernel(const Problem& problem, const ResolvedMask& mask,
                           const Overrides& overrides, bool speed_rules,
                           const std::vector<TileRule>& tile_rules, const KernelSet& disabled);

// The kernel that clears the rows of gradients that PyTorch's backward of packed sequences leaves
// unwritten; null where the build has none.
const Kernel* clear_kernel(const Problem& problem);

// The reason why a problem that this kernel would run does not run.
std::string why_disabled(const Kernel& kernel);

}  // namespace fa4
