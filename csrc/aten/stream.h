// The stream that torch would launch on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

#include "tensors.h"

// shim.h declares it under USE_CUDA only; weak because a CPU build of torch lacks it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream);
#pragma weak aoti_torch_get_current_cuda_stream

namespace fa4::aten {

inline void* current_stream(int32_t device_index) {
  void* stream;
  check_shim(aoti_torch_get_current_cuda_stream(device_index, &stream),
             "asking for the current stream");
  return stream;
}

}  // namespace fa4::aten
