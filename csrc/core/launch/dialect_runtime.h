// Tells the CUDA calls of a compiled kernel's object which launch they belong to.
#pragma once

#include "module.h"

namespace fa4 {

// Runs a kernel's host code, which ends in _cudaLaunchKernelEx and leaves a CUresult in the last
// argument. `function` belongs to the device that is current. `whole_device` says that the stream
// belongs to the device's primary context.
void launch_compiled(const Kernel& kernel, Function& function, bool whole_device, void** arguments,
                     int32_t count);

}  // namespace fa4
