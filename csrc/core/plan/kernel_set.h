// A set of the build's kernels, such as those that the user has disabled.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernel_table.h"

namespace fa4 {

class KernelSet {
 public:
  // Adds the kernels whose names match. A pattern is a name in which * stands for any text, ? for
  // one character and [...] for one of several. Returns how many kernels match.
  int32_t add(const std::string& pattern);

  bool empty() const { return rows_.empty(); }
  bool contains(const Kernel& kernel) const {
    return !rows_.empty() && rows_[static_cast<size_t>(&kernel - kKernels)];
  }

  friend bool operator<(const KernelSet& a, const KernelSet& b) { return a.rows_ < b.rows_; }

 private:
  std::vector<bool> rows_;  // one a row of kKernels; none at all where the set is empty
};

// The kernel itself, or one that it is launched with, whichever is in the set; null where none of
// them is.
inline const Kernel* first_needed_in(const KernelSet& set, const Kernel& kernel) {
  if (set.empty()) return nullptr;
  if (set.contains(kernel)) return &kernel;
  for (const int16_t row : {kernel.preprocess, kernel.postprocess_dq, kernel.postprocess_dk,
                            kernel.postprocess_dv, kernel.map_queries, kernel.map_keys}) {
    if (row >= 0 && set.contains(kKernels[row])) return &kKernels[row];
  }
  return nullptr;
}

}  // namespace fa4
