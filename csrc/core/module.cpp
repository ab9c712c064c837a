#include "module.h"

#include <memory>
#include <mutex>

#include "driver.h"
#include "error.h"

namespace fa4 {
namespace {

struct Module {
  CUlibrary library = nullptr;
  std::atomic<uint64_t> devices{0};       // bit i: loaded on device i
  std::unique_ptr<Function[]> functions;  // by device
};
static_assert(kMaxDevices <= 64, "a bit a device");

void check_load(int result, const Kernel& kernel, const char* what) {
  if (result) check(static_cast<CUresult>(result), concat("loading kernel ", kernel.name, " (", what, ")").c_str());
}

void load(const Kernel& kernel, Module& module, int device) {
  int result = 0;
  CUlibrary* library = &module.library;
  if (!module.library) {
    void* arguments[] = {&library, &result};
    kernel.load(arguments);
    check_load(result, kernel, "cuLibraryLoadData");
  }
  int32_t ordinal = device;
  void* arguments[] = {&library, &ordinal, &result};
  kernel.load_to_device(arguments);
  check_load(result, kernel, "setting its shared memory");
}

}  // namespace

Function& loaded(const Kernel& kernel, int device) {
  static Module* const modules = new Module[kNumKernels];  // for good: a call may run while the process exits
  static std::mutex mutex;
  Module& module = modules[&kernel - kKernels];
  const uint64_t bit = uint64_t{1} << device;
  if (module.devices.load(std::memory_order_acquire) & bit) return module.functions[device];
  std::lock_guard<std::mutex> lock(mutex);
  if (module.devices.load(std::memory_order_relaxed) & bit) return module.functions[device];
  load(kernel, module, device);
  if (!module.functions) module.functions.reset(new Function[kMaxDevices]());
  module.devices.fetch_or(bit, std::memory_order_release);
  return module.functions[device];
}

}  // namespace fa4
