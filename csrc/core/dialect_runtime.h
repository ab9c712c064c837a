// How a launch tells the CUDA calls of a compiled kernel's object what they are for.
#pragma once

#include "module.h"

namespace fa4 {

// Runs a kernel's host code, which ends in _cudaLaunchKernelEx. `function` is what it launches, of the device that is current.
void launch_compiled(const Kernel& kernel, Function& function, void** arguments, int32_t count);

}  // namespace fa4
