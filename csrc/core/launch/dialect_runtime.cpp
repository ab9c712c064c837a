// The host code inside a compiled kernel's object calls these functions. They are CUDA runtime
// calls under the DSL's names, written on the driver API. A kernel is a CUkernel; the attribute
// numbers of both APIs are the same.
#include "dialect_runtime.h"

#include <algorithm>

#include "driver.h"

namespace {

struct Launching {
  fa4::Function* function;
  bool whole_device;
};

thread_local Launching launching;

// This is cudaLaunchConfig_t, as the runtime's ABI fixes it.
struct LaunchConfig {
  unsigned int grid[3], block[3];
  size_t shared_memory_bytes;
  CUstream stream;
  CUlaunchAttribute* attributes;
  unsigned int num_attributes;
};

// The driver takes a CUkernel in place of a function, and then finds the function of the stream's
// context at every launch, which was measured to take 0.3 us. A function that was found once is
// kept and reused in the primary context. In another context it would be valid by luck at best.
CUresult find_function(CUkernel kernel, CUfunction& function) {
  if (!launching.whole_device) {
    function = reinterpret_cast<CUfunction>(kernel);
    return CUDA_SUCCESS;
  }
  std::atomic<CUfunction>& known = launching.function->in_primary_context;
  function = known.load(std::memory_order_acquire);
  return function ? CUDA_SUCCESS : fa4::driver().kernel_get_function(&function, kernel);
}

// Keeps the function after a launch has succeeded, because the first launch may fail for want of
// memory for the kernel's code.
void keep(CUfunction function) {
  std::atomic<CUfunction>& known = launching.function->in_primary_context;
  if (launching.whole_device && !known.load(std::memory_order_relaxed))
    known.store(function, std::memory_order_release);
}

uint32_t cluster_size(const CUlaunchConfig& config) {
  for (unsigned int i = 0; i < config.numAttrs; ++i) {
    const CUlaunchAttribute& given = config.attrs[i];
    if (given.id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    return given.value.clusterDim.x * given.value.clusterDim.y * given.value.clusterDim.z;
  }
  return 1;
}

// The driver answers for the context that is current, but a launch runs in the context of the
// stream.
template <class Question>
CUresult ask_in_context_of(CUstream stream, const Question& question) {
  if (launching.whole_device) return question();
  CUcontext context, popped;
  if (const CUresult result = fa4::driver().stream_get_context(stream, &context)) return result;
  if (const CUresult result = fa4::driver().context_push(context)) return result;
  const CUresult answer = question();
  fa4::driver().context_pop(&popped);
  return answer;
}

// Returns CUDA_ERROR_INVALID_CLUSTER_SIZE where the kernel's clusters do not fit, and any other
// error of the driver as it is. A cluster's CTAs run in one GPC. A green context or a share under
// MPS may have less of every GPC than the cluster needs; the driver then says that no cluster can
// be active. A graph that captures the launch would report this only when the graph is made.
CUresult check_clusters(CUfunction function, const CUlaunchConfig& config) {
  const uint32_t size = cluster_size(config);
  if (size <= 1) return CUDA_SUCCESS;
  const uint32_t bit = uint32_t{1} << std::min<uint32_t>(size - 1, 31);
  std::atomic<uint32_t>& known = launching.function->clusters_that_fit;
  if (launching.whole_device && known.load(std::memory_order_relaxed) & bit) return CUDA_SUCCESS;
  int clusters = 0;
  const CUresult result = ask_in_context_of(config.hStream, [&] {
    return fa4::driver().max_active_clusters(&clusters, function, &config);
  });
  if (result != CUDA_SUCCESS) return result;
  if (clusters < 1) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  if (launching.whole_device) known.fetch_or(bit, std::memory_order_relaxed);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

int _cudaGetDevice(int* device) { return fa4::driver().context_get_device(device); }

int _cudaDeviceGetAttribute(int* value, int attribute, int device) {
  return fa4::driver().device_get_attribute(value, static_cast<CUdevice_attribute>(attribute),
                                            device);
}

int _cudaLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* jit_options,
                         void** jit_values, unsigned int num_jit_options, CUlibraryOption* options,
                         void** values, unsigned int num_options) {
  return fa4::driver().library_load_data(library, code, jit_options, jit_values, num_jit_options,
                                         options, values, num_options);
}

int _cudaLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  return fa4::driver().library_get_kernel(kernel, library, name);
}

int _cuKernelGetAttribute(int* value, int attribute, CUkernel kernel, int device) {
  return fa4::driver().kernel_get_attribute(value, static_cast<CUfunction_attribute>(attribute),
                                            kernel, device);
}

int _cudaKernelSetAttributeForDevice(CUkernel kernel, int attribute, int value, int device) {
  const auto set = fa4::driver().kernel_set_attribute;
  const CUresult result = set(static_cast<CUfunction_attribute>(attribute), value, kernel, device);
  // The decode kernel's clusters may have 16 CTAs, twice what every GPU promises. This has no
  // effect on other kernels.
  return result == CUDA_SUCCESS
             ? set(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, kernel, device)
             : result;
}

int _cudaFuncSetAttribute(CUkernel kernel, int attribute, int value) {
  CUdevice device;
  const CUresult result = fa4::driver().context_get_device(&device);
  return result == CUDA_SUCCESS ? _cudaKernelSetAttributeForDevice(kernel, attribute, value, device)
                                : result;
}

int _cudaLaunchKernelEx(const LaunchConfig* given, CUkernel kernel, void** arguments) {
  CUfunction function;
  if (const CUresult result = find_function(kernel, function)) return result;
  CUlaunchConfig config{};
  config.gridDimX = given->grid[0], config.gridDimY = given->grid[1],
  config.gridDimZ = given->grid[2];
  config.blockDimX = given->block[0], config.blockDimY = given->block[1],
  config.blockDimZ = given->block[2];
  config.sharedMemBytes = static_cast<unsigned int>(given->shared_memory_bytes);
  config.hStream = given->stream;
  config.attrs = given->attributes;
  config.numAttrs = given->num_attributes;
  if (const CUresult result = check_clusters(function, config)) return result;
  const CUresult result = fa4::driver().launch_kernel(&config, function, arguments, nullptr);
  if (result == CUDA_SUCCESS) keep(function);
  return result;
}

}  // extern "C"

namespace fa4 {

void launch_compiled(const Kernel& kernel, Function& function, bool whole_device, void** arguments,
                     int32_t count) {
  launching = {&function, whole_device};
  kernel.launch(arguments, count);
}

}  // namespace fa4
