#include "driver.h"

#include <array>
#include <atomic>
#include <mutex>

#include "../error.h"
#include "dynamic_library.h"

namespace fa4 {
namespace {

constexpr int kOldestVersion = 13000;  // This is CUDA 13.0.

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) fail("the CUDA driver is too old: it has no function ", name);
}

// cuda.h renames some functions to their current version (cuCtxPushCurrent_v2), so the name is
// expanded before it is quoted.
#define FA4_QUOTE(name) #name
#define FA4_FIND(field, name) find(library, FA4_QUOTE(name), driver.field)

Driver open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) fail("no CUDA driver: libcuda.so.1 could not be opened");
  Driver driver;
  FA4_FIND(get_version, cuDriverGetVersion);
  FA4_FIND(get_error_name, cuGetErrorName);
  FA4_FIND(get_error_string, cuGetErrorString);
  FA4_FIND(device_get_attribute, cuDeviceGetAttribute);
  FA4_FIND(primary_context_retain, cuDevicePrimaryCtxRetain);
  FA4_FIND(context_get_device, cuCtxGetDevice);
  FA4_FIND(context_get_resource, cuCtxGetDevResource);
  FA4_FIND(context_set, cuCtxSetCurrent);
  FA4_FIND(context_push, cuCtxPushCurrent);
  FA4_FIND(context_pop, cuCtxPopCurrent);
  FA4_FIND(library_load_data, cuLibraryLoadData);
  FA4_FIND(library_get_kernel, cuLibraryGetKernel);
  FA4_FIND(kernel_get_attribute, cuKernelGetAttribute);
  FA4_FIND(kernel_set_attribute, cuKernelSetAttribute);
  FA4_FIND(kernel_get_function, cuKernelGetFunction);
  FA4_FIND(stream_get_context, cuStreamGetCtx);
  FA4_FIND(max_active_clusters, cuOccupancyMaxActiveClusters);
  FA4_FIND(launch_kernel, cuLaunchKernelEx);
  FA4_FIND(memset_d32_async, cuMemsetD32Async);
  FA4_FIND(memory_info, cuMemGetInfo);
  int version = 0;
  driver.get_version(&version);
  if (version < kOldestVersion) {
    fail("the CUDA driver is too old: it is for CUDA ", version / 1000, ".", version % 1000 / 10,
         ", the kernels are compiled for 13");
  }
  return driver;
}

// The driver is looked for once. Where there is none, every call would search again.
struct Opened {
  Driver driver{};
  std::optional<std::string> problem;

  Opened() {
    try {
      driver = open_driver();
    } catch (const Error& error) {
      problem = error.what();
    }
  }
};

const Opened& opened() {
  // It is never destroyed, because a call may run while the process exits.
  static const Opened* const opened = new Opened;
  return *opened;
}

struct CachedDevice {
  std::atomic<bool> ready{false};
  Processors all{};
  CUcontext primary_context = nullptr;
};

int attribute(CUdevice device, CUdevice_attribute which) {
  int value = 0;
  check(driver().device_get_attribute(&value, which, device), "cuDeviceGetAttribute");
  return value;
}

CachedDevice& cached_device(int device) {
  static std::array<CachedDevice, kMaxDevices> devices;
  static std::mutex mutex;
  if (device < 0 || device >= kMaxDevices)
    fail("device index ", device, " is outside 0..", kMaxDevices - 1);
  CachedDevice& cached = devices[device];
  if (cached.ready.load(std::memory_order_acquire)) return cached;
  std::lock_guard<std::mutex> lock(mutex);
  if (!cached.ready.load(std::memory_order_relaxed)) {
    cached.all.capability = 10 * attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                            attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    cached.all.sm_count = attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    cached.all.whole_device = true;
    check(driver().primary_context_retain(&cached.primary_context, device),
          "cuDevicePrimaryCtxRetain");
    cached.ready.store(true, std::memory_order_release);
  }
  return cached;
}

}  // namespace

const std::optional<std::string>& driver_problem() { return opened().problem; }

const Driver& driver() {
  if (driver_problem()) fail(*driver_problem());
  return opened().driver;
}

void check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char *name = nullptr, *text = nullptr;
  driver().get_error_name(result, &name);
  driver().get_error_string(result, &text);
  fail(what, " failed: ", name ? name : "unknown error", " (", text ? text : "", ")");
}

Processors processors(int device, void* stream) {
  const CachedDevice& cached = cached_device(device);
  CUcontext context;
  // Where no context is current, or that of another device, DeviceScope will make the primary one
  // current.
  if (driver().stream_get_context(static_cast<CUstream>(stream), &context) != CUDA_SUCCESS)
    return cached.all;
  if (context == cached.primary_context) return cached.all;
  CUdevice current;
  if (!stream && driver().context_get_device(&current) == CUDA_SUCCESS && current != device)
    return cached.all;
  // Contexts come and go, and a new one may have the address of an old one. So nothing about them
  // is kept.
  CUdevResource part;
  const bool known =
      driver().context_get_resource(context, &part, CU_DEV_RESOURCE_TYPE_SM) == CUDA_SUCCESS;
  return {cached.all.capability,
          known ? static_cast<int32_t>(part.sm.smCount) : cached.all.sm_count, false};
}

DeviceScope::DeviceScope(int device) {
  CUdevice current;
  const bool any = driver().context_get_device(&current) == CUDA_SUCCESS;
  if (any && current == device) return;
  const CUcontext context = cached_device(device).primary_context;
  if (any) {
    check(driver().context_push(context), "cuCtxPushCurrent");
    pushed_ = true;
  } else {
    check(driver().context_set(context), "cuCtxSetCurrent");
  }
}

DeviceScope::~DeviceScope() {
  CUcontext popped;
  if (pushed_) driver().context_pop(&popped);
}

}  // namespace fa4
