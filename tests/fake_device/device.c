// A CUDA driver without a device, to be preloaded: launches are noted and do nothing, memory is the host's. Before it also come the
// few functions of torch's C interface that would say that a tensor is the CPU's.
#include <cuda.h>
#include <stdint.h>
#include <string.h>

const char* launched[1024];  // the kernels' names
int launches = 0;
int64_t cleared_bytes = 0;

static int attribute(CUdevice_attribute which) {  // of an H200
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return 132;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return 232448;
    default:
      return 0;
  }
}

CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char** text) { return *text = "error", CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) { return *text = "error", CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  return *value = attribute(which), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return *context = NULL, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext* context) { return *context = NULL, CUDA_SUCCESS; }
CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* options, void** values, unsigned count,
                           CUlibraryOption* library_options, void** library_values, unsigned library_count) {
  return *library = NULL, CUDA_SUCCESS;
}
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  return *kernel = (CUkernel)strdup(name), CUDA_SUCCESS;
}
CUresult cuKernelGetAttribute(int* value, CUfunction_attribute which, CUkernel kernel, CUdevice device) {
  return *value = 0, CUDA_SUCCESS;
}
CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) { return *function = (CUfunction)kernel, CUDA_SUCCESS; }
CUresult cuKernelSetAttribute(CUfunction_attribute which, int value, CUkernel kernel, CUdevice device) { return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  launched[launches++ % 1024] = (const char*)function;
  return CUDA_SUCCESS;
}
CUresult cuMemsetD32Async(CUdeviceptr begin, unsigned value, size_t count, CUstream stream) {
  cleared_bytes += 4 * count;
  memset((void*)begin, 0, 4 * count);
  return CUDA_SUCCESS;
}

int32_t aoti_torch_device_type_cuda(void) { return 0; }  // the CPU's
int32_t aoti_torch_get_device_index(void* tensor, int32_t* index) { return *index = 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) { return *stream = NULL, 0; }
