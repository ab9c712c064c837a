// The few functions of the CUDA driver that launching a compiled kernel takes. They are found at
// run time in the driver that torch loaded, so the library links nothing of CUDA: it loads on a
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

const Driver& driver();  // throws Error where there is a driver_problem()
// The reason why there is no driver: the machine has none, or one too old for the kernels.
const std::optional<std::string>& driver_problem();

void check(CUresult result, const char* what);  // throws Error with the driver's own words

constexpr int kMaxDevices = 64;

// What a launch on a stream runs on.
struct Processors {
  int32_t capability;  // 90 for 9.0
  int32_t sm_count;
  bool whole_device;  // false: a part of it, as a green context has, or a context that is not the
                      // primary one
};

// The SMs are those of the stream, and for the null stream those of the context that is current.
// Both may be a green context's.
Processors processors(int device, void* stream);

// Makes the device's primary context current for the calling thread where another device's is, and
// puts that back. A thread that has none keeps it, as after any call of the CUDA runtime: what runs
// next in autograd's threads counts on one. A context of the same device stays: it may be a green
// one, whose share of the device the null stream then stands for.
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
