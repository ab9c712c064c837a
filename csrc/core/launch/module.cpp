#include "module.h"

#include <memory>
#include <mutex>

#include "../error.h"
#include "driver.h"

namespace fa4 {
namespace {

struct Module {
  CUlibrary library = nullptr;
  // Bit i says that the kernel is loaded on device i.
  std::atomic<uint64_t> devices{0};
  // There is one for each device.
  std::unique_ptr<Function[]> functions;
};
static_assert(kMaxDevices <= 64, "a bit a device");

std::mutex loading;

// The modules are never destroyed, because a call may run while the process exits.
Module& module_of(const Kernel& kernel) {
  static Module* const modules = new Module[kNumKernels];
  return modules[&kernel - kKernels];
}

void load(const Kernel& kernel, Module& module, int device) {
  const auto step = [&kernel](const char* what) {
    return concat("loading kernel ", kernel.name, " (", what, ")");
  };
  int result = 0;
  CUlibrary* library = &module.library;
  if (!module.library) {
    void* arguments[] = {&library, &result};
    kernel.load(arguments);
    check_memory(static_cast<CUresult>(result), step("cuLibraryLoadData"), true);
  }
  int32_t ordinal = device;
  void* arguments[] = {&library, &ordinal, &result};
  kernel.load_to_device(arguments);
  check_memory(static_cast<CUresult>(result), step("setting its shared memory"), true);
}

}  // namespace

void check_memory(CUresult result, const std::string& step, bool loads) {
  if (result == CUDA_SUCCESS) return;
  // This is many times what a kernel's code takes. torch leaves less on a device that it has
  // filled, by 2 or 20 MiB at a time.
  constexpr size_t kLittle = 64 << 20;
  size_t free = 0, total = 0;
  const bool known = driver().memory_info(&free, &total) == CUDA_SUCCESS;
  const bool out = result == CUDA_ERROR_OUT_OF_MEMORY || (loads && known && free < kLittle);
  try {
    check(result, step.c_str());
  } catch (const Error& error) {
    if (!out) throw;
    const std::string when =
        known ? concat("With ", free >> 20, " MiB of device memory free, ") : "On the device, ";
    throw OutOfMemory(concat("CUDA out of memory. ", when, error.what()));
  }
}

Function& loaded(const Kernel& kernel, int device) {
  Module& module = module_of(kernel);
  const uint64_t bit = uint64_t{1} << device;
  if (module.devices.load(std::memory_order_acquire) & bit) return module.functions[device];
  std::lock_guard<std::mutex> lock(loading);
  if (module.devices.load(std::memory_order_relaxed) & bit) return module.functions[device];
  load(kernel, module, device);
  if (!module.functions) module.functions.reset(new Function[kMaxDevices]());
  module.devices.fetch_or(bit, std::memory_order_release);
  return module.functions[device];
}

void load_anew(const Kernel& kernel) {
  std::lock_guard<std::mutex> lock(loading);
  Module& module = module_of(kernel);
  for (int device = 0; device < kMaxDevices; ++device) {
    if (module.functions && module.functions[device].in_primary_context) return;
  }
  // The library stays with the driver, because another thread may be about to launch from it.
  module.library = nullptr;
  module.devices = 0;
}

}  // namespace fa4
