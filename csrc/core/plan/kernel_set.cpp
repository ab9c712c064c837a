#include "kernel_set.h"

#include <fnmatch.h>

#include <cstring>

namespace fa4 {

int32_t KernelSet::add(const std::string& pattern) {
  // Whole names, of which there may be hundreds, are compared faster than patterns.
  const bool whole = pattern.find_first_of("*?[") == std::string::npos;
  int32_t found = 0;
  for (int32_t row = 0; row < kNumKernels; ++row) {
    const char* name = kKernels[row].name;
    const int differs =
        whole ? std::strcmp(pattern.c_str(), name) : fnmatch(pattern.c_str(), name, FNM_NOESCAPE);
    if (differs) continue;
    rows_.resize(static_cast<size_t>(kNumKernels));
    rows_[static_cast<size_t>(row)] = true;
    ++found;
  }
  return found;
}

}  // namespace fa4
