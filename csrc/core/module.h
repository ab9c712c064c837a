// Loading compiled kernels: each on its first use, once per device, from any thread.
#pragma once

#include <cuda.h>

#include <atomic>

#include "kernel_table.h"

namespace fa4 {

// What a kernel is on one device; null until its first launch there.
using Function = std::atomic<CUfunction>;

// Returns at once when the kernel is loaded on the device. Throws Error with the kernel's name and the driver's words.
Function& loaded(const Kernel& kernel, int device);

}  // namespace fa4
