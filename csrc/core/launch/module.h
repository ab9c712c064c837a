// Loads compiled kernels: each on its first use, once per device, from any thread.
#pragma once

#include <cuda.h>

#include <atomic>
#include <string>

#include "../plan/kernel_table.h"

namespace fa4 {

// Holds what is known of a kernel on one device.
struct Function {
  // The function of the device's primary context. It is null until a launch there has succeeded.
  std::atomic<CUfunction> in_primary_context{nullptr};
  // Bit n says that the whole device can hold a cluster of n + 1 CTAs.
  std::atomic<uint32_t> clusters_that_fit{0};
};

// Throws an Error with the driver's words unless the step succeeded, an OutOfMemory where memory
// was lacking. `loads` says that the driver may load a kernel's code in this step. For want of
// memory it may then say "unknown error" or "invalid argument".
void check_memory(CUresult result, const std::string& step, bool loads);

// Returns at once where the kernel is loaded on the device. Throws an Error with the kernel's name
// and the driver's words.
Function& loaded(const Kernel& kernel, int device);

// Lets the next call of loaded() load the kernel anew, unless a launch of it has succeeded. Where
// the first one fails for want of memory for the kernel's code, the driver refuses those after it,
// too.
void load_anew(const Kernel& kernel);

}  // namespace fa4
