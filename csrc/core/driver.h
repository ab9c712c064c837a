// The few functions of the CUDA driver that launching a compiled kernel takes, found at run time in the driver that torch loaded.
// So the library links nothing of CUDA: it loads on a machine without a GPU, and next to any CUDA 13 runtime.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fa4 {

struct Driver {
  decltype(&cuDriverGetVersion) get_version;
  decltype(&cuGetErrorName) get_error_name;
  decltype(&cuGetErrorString) get_error_string;
  decltype(&cuDeviceGetAttribute) device_get_attribute;
  decltype(&cuDevicePrimaryCtxRetain) primary_context_retain;
  decltype(&cuCtxGetDevice) context_get_device;
  decltype(&cuCtxSetCurrent) context_set;
  decltype(&cuCtxPushCurrent) context_push;
  decltype(&cuCtxPopCurrent) context_pop;
  decltype(&cuLibraryLoadData) library_load_data;
  decltype(&cuLibraryGetKernel) library_get_kernel;
  decltype(&cuKernelGetAttribute) kernel_get_attribute;
  decltype(&cuKernelSetAttribute) kernel_set_attribute;
  decltype(&cuKernelGetFunction) kernel_get_function;
  decltype(&cuLaunchKernelEx) launch_kernel;
  decltype(&cuMemsetD32Async) memset_d32_async;
};

const Driver& driver();  // throws Error when there is no CUDA driver, or one too old for the kernels

void check(CUresult result, const char* what);  // throws Error with the driver's own words

struct DeviceProperties {
  int32_t capability;  // 90 for 9.0
  int32_t sm_count;
};

constexpr int kMaxDevices = 64;

const DeviceProperties& device_properties(int device);

// Makes the device's primary context current for the calling thread, and puts back another device's. A thread that has none keeps
// it, as after any call of the CUDA runtime: what runs next in autograd's threads counts on one.
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
