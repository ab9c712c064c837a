// What the host code inside a compiled kernel's object calls: CUDA runtime calls under the DSL's names, here on the driver API.
// A kernel is a CUkernel; the attribute numbers of both APIs are the same.
#include "dialect_runtime.h"

#include "driver.h"

namespace {

thread_local fa4::Function* launching;

// cudaLaunchConfig_t, as the runtime's ABI fixes it.
struct LaunchConfig {
  unsigned int grid[3], block[3];
  size_t shared_memory_bytes;
  CUstream stream;
  CUlaunchAttribute* attributes;
  unsigned int num_attributes;
};

}  // namespace

extern "C" {

int _cudaGetDevice(int* device) { return fa4::driver().context_get_device(device); }

int _cudaDeviceGetAttribute(int* value, int attribute, int device) {
  return fa4::driver().device_get_attribute(value, static_cast<CUdevice_attribute>(attribute), device);
}

int _cudaLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* jit_options, void** jit_values,
                         unsigned int num_jit_options, CUlibraryOption* options, void** values, unsigned int num_options) {
  return fa4::driver().library_load_data(library, code, jit_options, jit_values, num_jit_options, options, values, num_options);
}

int _cudaLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  return fa4::driver().library_get_kernel(kernel, library, name);
}

int _cuKernelGetAttribute(int* value, int attribute, CUkernel kernel, int device) {
  return fa4::driver().kernel_get_attribute(value, static_cast<CUfunction_attribute>(attribute), kernel, device);
}

int _cudaKernelSetAttributeForDevice(CUkernel kernel, int attribute, int value, int device) {
  const auto set = fa4::driver().kernel_set_attribute;
  const CUresult result = set(static_cast<CUfunction_attribute>(attribute), value, kernel, device);
  // The decode kernel's clusters may have 16 thread blocks, twice of what every GPU has. No effect on other kernels.
  return result == CUDA_SUCCESS ? set(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, kernel, device) : result;
}

int _cudaFuncSetAttribute(CUkernel kernel, int attribute, int value) {
  CUdevice device;
  const CUresult result = fa4::driver().context_get_device(&device);
  return result == CUDA_SUCCESS ? _cudaKernelSetAttributeForDevice(kernel, attribute, value, device) : result;
}

// The driver takes a CUkernel too, but then looks for its function at every launch, which was measured to take 0.3 us.
int _cudaLaunchKernelEx(const LaunchConfig* given, CUkernel kernel, void** arguments) {
  CUfunction function = launching->load(std::memory_order_acquire);
  if (!function) {
    const CUresult result = fa4::driver().kernel_get_function(&function, kernel);
    if (result != CUDA_SUCCESS) return result;
    launching->store(function, std::memory_order_release);
  }
  CUlaunchConfig config{};
  config.gridDimX = given->grid[0], config.gridDimY = given->grid[1], config.gridDimZ = given->grid[2];
  config.blockDimX = given->block[0], config.blockDimY = given->block[1], config.blockDimZ = given->block[2];
  config.sharedMemBytes = static_cast<unsigned int>(given->shared_memory_bytes);
  config.hStream = given->stream;
  config.attrs = given->attributes;
  config.numAttrs = given->num_attributes;
  return fa4::driver().launch_kernel(&config, function, arguments, nullptr);
}

}  // extern "C"

namespace fa4 {

void launch_compiled(const Kernel& kernel, Function& function, void** arguments, int32_t count) {
  launching = &function;
  kernel.launch(arguments, count);
}

}  // namespace fa4
