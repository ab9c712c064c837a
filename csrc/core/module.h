// Loading compiled kernels: each on its first use, once per device, from any thread.
#pragma once

#include "kernel_table.h"

namespace fa4 {

// Returns at once when the kernel is loaded on the device. Throws Error with the kernel's name and the driver's words.
void ensure_loaded(const Kernel& kernel, int device);

}  // namespace fa4
