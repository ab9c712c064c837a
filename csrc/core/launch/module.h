// Loading compiled kernels: each on its first use, once per device, from any thread.
#pragma once

#include <cuda.h>

#include <atomic>

#include "../plan/kernel_table.h"

namespace fa4 {

// What is known of a kernel on one device.
struct Function {
  // In the device's primary context; null until a launch there has succeeded.
  std::atomic<CUfunction> in_primary_context{nullptr};
  std::atomic<uint32_t> clusters_that_fit{
      0};  // bit n: the whole device can hold a cluster of n + 1 CTAs
};

// Throws Error with the kernel's name and the driver's words unless the step succeeded, OutOfMemory
// where memory was what it lacked.
void check_loading(CUresult result, const Kernel& kernel, const char* step);

// Returns at once when the kernel is loaded on the device. Throws Error with the kernel's name and
// the driver's words.
Function& loaded(const Kernel& kernel, int device);

}  // namespace fa4
