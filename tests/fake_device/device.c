// This is a CUDA driver without a device, to be preloaded. It notes launches and does nothing
// unless someone else runs them; its memory is the host's. It also replaces the few functions of
// torch's C interface that would say that a tensor is on the CPU.
#include <cuda.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct kernel {
  const char* name;
  const void* code;  // This is the fat binary.
  int is_loaded;     // A launch has succeeded.
  int is_refused;    // The first launch has failed, and the driver refuses every other one.
};

const char* launched[1024];  // These are the kernels' names.
int launches = 0;
int64_t cleared_bytes = 0, cleared_at = 0;
int allocations = 0;
int multiprocessors = 132, capability = 90;
int driver_version = 13000, version_questions = 0;
// cuLaunchKernelEx, cuKernelGetFunction, cuLibraryLoadData, cuCtxGetDevResource and
// cuOccupancyMaxActiveClusters return these.
int launch_result = 0, function_result = 0, load_result = 0, resource_result = 0;
int clusters_result = 0, active_clusters = 1;
// The streams' context is not the device's primary one.
int other_context = 0;
int64_t free_memory = (int64_t)1 << 36;
// Says how many of the next calls fail in torch's C interface. An impossible allocation fails in
// C++ as well: it asks for the device type that comes next, CUDA's, for which a CPU build of torch
// has no allocator.
int failing_allocations = 0, impossible_allocations = 0, failing_copies = 0, failing_undefined = 0;
static int next_device_type = 0;
// `on_launch` runs a launch and returns 0 when it is done; `on_allocation` hears of each tensor
// that is allocated. Both are null where nobody runs launches.
int (*on_launch)(const void* code, void** arguments, const unsigned* grid, unsigned threads,
                 unsigned cluster, unsigned shared) = NULL;
void (*on_allocation)(void* data, int64_t bytes) = NULL;

// Returns an attribute of an H200.
static int attribute(CUdevice_attribute which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return capability / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return capability % 10;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return multiprocessors;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return 232448;
    default:
      return 0;
  }
}

CUresult cuDriverGetVersion(int* version) {
  return ++version_questions, *version = driver_version, CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_UNKNOWN           ? "CUDA_ERROR_UNKNOWN"
          : error == CUDA_ERROR_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
                                                : "error";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  return *text = "error", CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  return *value = attribute(which), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = NULL, CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) {
  return *context = other_context ? (CUcontext)&other_context : NULL, CUDA_SUCCESS;
}
CUresult cuCtxGetDevResource(CUcontext context, CUdevResource* resource, CUdevResourceType type) {
  return resource->sm.smCount = multiprocessors, resource_result;
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function,
                                      const CUlaunchConfig* config) {
  return *clusters = active_clusters, clusters_result;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext* context) { return *context = NULL, CUDA_SUCCESS; }
CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* options,
                           void** values, unsigned count, CUlibraryOption* library_options,
                           void** library_values, unsigned library_count) {
  if (!load_result) *library = (CUlibrary)code;
  return load_result;
}
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  struct kernel* found = calloc(1, sizeof *found);
  found->name = strdup(name), found->code = library;
  return *kernel = (CUkernel)found, CUDA_SUCCESS;
}
CUresult cuKernelGetAttribute(int* value, CUfunction_attribute which, CUkernel kernel,
                              CUdevice device) {
  return *value = 0, CUDA_SUCCESS;
}
CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  return *function = (CUfunction)kernel, function_result;
}
CUresult cuKernelSetAttribute(CUfunction_attribute which, int value, CUkernel kernel,
                              CUdevice device) {
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                          void** extra) {
  struct kernel* kernel = (struct kernel*)function;
  if (kernel->is_refused) return CUDA_ERROR_INVALID_VALUE;
  kernel->is_refused = launch_result && !kernel->is_loaded;
  if (launch_result) return launch_result;
  kernel->is_loaded = 1;
  launched[launches++ % 1024] = kernel->name;
  if (!on_launch) return CUDA_SUCCESS;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute* given = &config->attrs[i];
    if (given->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      cluster = given->value.clusterDim.x * given->value.clusterDim.y;
  }
  const unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const int failed =
      on_launch(kernel->code, arguments, grid, config->blockDimX, cluster, config->sharedMemBytes);
  return failed ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}
CUresult cuMemsetD32Async(CUdeviceptr begin, unsigned value, size_t count, CUstream stream) {
  cleared_bytes += 4 * count, cleared_at = (int64_t)begin;
  memset((void*)begin, 0, 4 * count);
  return CUDA_SUCCESS;
}
CUresult cuMemGetInfo(size_t* free, size_t* total) {
  return *free = free_memory, *total = (size_t)1 << 37, CUDA_SUCCESS;
}

// Returns the type of the CPU, 0, unless an impossible allocation comes next.
int32_t aoti_torch_device_type_cuda(void) {
  const int type = next_device_type;
  return next_device_type = 0, type;
}
int32_t aoti_torch_get_device_index(void* tensor, int32_t* index) { return *index = 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  return *stream = NULL, 0;
}

static void* torch_function(const char* name) {
  return dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD), name);
}

int32_t aoti_torch_get_data_ptr(void* tensor, void** data);
int32_t aoti_torch_get_storage_size(void* tensor, int64_t* bytes);
int32_t aoti_torch_empty_strided(int64_t dim, const int64_t* size, const int64_t* stride,
                                 int32_t dtype, int32_t device_type, int32_t device_index,
                                 void** tensor) {
  if (failing_allocations > 0) return --failing_allocations, 1;
  if (impossible_allocations > 0) return --impossible_allocations, next_device_type = 1;
  const __typeof__(&aoti_torch_empty_strided) torch = torch_function("aoti_torch_empty_strided");
  const int32_t failed = torch(dim, size, stride, dtype, device_type, device_index, tensor);
  allocations += !failed;
  if (failed || !on_allocation) return failed;
  const __typeof__(&aoti_torch_get_data_ptr) get_data = torch_function("aoti_torch_get_data_ptr");
  const __typeof__(&aoti_torch_get_storage_size) get_size =
      torch_function("aoti_torch_get_storage_size");
  void* data = NULL;
  int64_t bytes = 0;
  if (get_data(*tensor, &data) || get_size(*tensor, &bytes)) return 1;
  return on_allocation(data, bytes), 0;
}
int32_t aoti_torch_new_uninitialized_tensor(void** tensor) {
  if (failing_undefined > 0) return --failing_undefined, 1;
  const __typeof__(&aoti_torch_new_uninitialized_tensor) torch =
      torch_function("aoti_torch_new_uninitialized_tensor");
  return torch(tensor);
}
int32_t aoti_torch_copy_(void* to, void* from, int32_t non_blocking) {
  if (failing_copies > 0) return --failing_copies, 1;
  const __typeof__(&aoti_torch_copy_) torch = torch_function("aoti_torch_copy_");
  return torch(to, from, non_blocking);
}
