// Holds the few functions of the CUDA driver that launching a compiled kernel takes. They are found
// at run time in the driver that torch loaded, so the library links nothing of CUDA: it loads on a
// machine without a GPU, and next to any CUDA 13 runtime.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <optional>
#include <string>

namespace fa4 {

struct Driver {
  decltype(&cuDriverGetVersion) get_version;
  decltype(&cuGetErrorName) get_error_name;
  decltype(&cuGetErrorString) get_error_string;
  decltype(&cuDeviceGetAttribute) device_get_attribute;
  decltype(&cuDevicePrimaryCtxRetain) primary_context_retain;
  decltype(&cuCtxGetDevice) context_get_device;
  decltype(&cuCtxGetDevResource) context_get_resource;
  decltype(&cuCtxSetCurrent) context_set;
  decltype(&cuCtxPushCurrent) context_push;
  decltype(&cuCtxPopCurrent) context_pop;
  decltype(&cuLibraryLoadData) library_load_data;
  decltype(&cuLibraryGetKernel) library_get_kernel;
  decltype(&cuKernelGetAttribute) kernel_get_attribute;
  decltype(&cuKernelSetAttribute) kernel_set_attribute;
  decltype(&cuKernelGetFunction) kernel_get_function;
  decltype(&cuStreamGetCtx) stream_get_context;
  decltype(&cuOccupancyMaxActiveClusters) max_active_clusters;
  decltype(&cuLaunchKernelEx) launch_kernel;
  decltype(&cuMemsetD32Async) memset_d32_async;
  decltype(&cuMemGetInfo) memory_info;
};

// Throws an Error where there is a driver_problem().
const Driver& driver();
// Returns why there is no driver: the machine has none, or one too old for the kernels.
const std::optional<std::string>& driver_problem();

// Throws an Error with the driver's own words unless the call succeeded.
void check(CUresult result, const char* what);

constexpr int kMaxDevices = 64;

// Describes what a launch on a stream runs on.
struct Processors {
  int32_t capability;  // 90 stands for 9.0.
  int32_t sm_count;
  bool whole_device;  // false: a part of it, as a green context has, or a context that is not the
                      // primary one
};

// Returns the SMs of the stream. The null stream has the SMs of the context that is current. Both
// may be those of a green context.
Processors processors(int device, void* stream);

// Makes the device's primary context current if the calling thread's context is another device's,
// and restores that one at the end. On a thread without a context the primary one stays current, as
// after any call of the CUDA runtime; autograd's threads count on that. A context of the same
// device is left alone: it may be a green context, and the null stream then means its share of the
// device.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace fa4
