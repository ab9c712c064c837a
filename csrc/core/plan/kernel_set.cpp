#include "kernel_set.h"

#include <fnmatch.h>

namespace fa4 {

int32_t KernelSet::add(const std::string& pattern) {
  int32_t matches = 0;
  for (int32_t row = 0; row < kNumKernels; ++row) {
    if (fnmatch(pattern.c_str(), kKernels[row].name, FNM_NOESCAPE) != 0) continue;
    rows_.resize(static_cast<size_t>(kNumKernels));
    rows_[static_cast<size_t>(row)] = true;
    ++matches;
  }
  return matches;
}

}  // namespace fa4
