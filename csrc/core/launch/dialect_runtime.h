// How a launch tells the CUDA calls of a compiled kernel's object what they are for.
#pragma once

#include "module.h"

namespace fa4 {

// Runs a kernel's host code, which ends in _cudaLaunchKernelEx and leaves a CUresult in the last
// argument. `function`: of the device that is current. `whole_device`: the stream is one of the
// device's primary context.
void launch_compiled(const Kernel& kernel, Function& function, bool whole_device, void** arguments,
                     int32_t count);

}  // namespace fa4
