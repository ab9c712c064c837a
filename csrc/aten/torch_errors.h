// torch's C interface keeps torch's own errors from us: each of its functions catches what torch
// throws and returns a code, and a program would get a RuntimeError where torch raises
// torch.OutOfMemoryError, ValueError or NotImplementedError. So a call that has failed is made once
// more through the exported C++ function behind it, which lets the exception pass. Only
// allocations (cuda_memory.h) and the low-level cuDNN ops use C++ at once. The C++ function is
// looked up under the mangled name, which holds its parameters' types; where a torch lacks it,
// the error stays a RuntimeError. The types below pass values in registers and memory as C++ passes
// torch's own types, and the tests check this: at::Tensor is one counted pointer, and
// AtenTensorHandle points to an at::Tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "../core/error.h"
#include "tensors.h"

namespace fa4::aten {

// This is an at::Tensor that a C++ function returns.
class TensorValue {
 public:
  TensorValue(const TensorValue&) = delete;
  TensorValue& operator=(const TensorValue&) = delete;
  // Releases the tensor, unless it was taken.
  ~TensorValue();

  // Takes the tensor out. If this throws, the tensor is still there.
  Handle take();

 private:
  void* impl_;  // null once it was taken
};

// This is a const std::optional<at::Tensor>& argument, borrowed from a handle that may be null.
struct OptionalTensorValue {
  void* impl;
  bool given;

  explicit OptionalTensorValue(AtenTensorHandle handle)
      : impl(handle ? *reinterpret_cast<void**>(handle) : nullptr), given(handle != nullptr) {}
};

struct DeviceValue {  // This is c10::Device.
  int8_t type, index;
};

inline DeviceValue cuda_device(int32_t index) {
  return {static_cast<int8_t>(aoti_torch_device_type_cuda()), static_cast<int8_t>(index)};
}

// Each function repeats a call that failed with its C function. `what` goes into the error where
// this torch lacks the C++ function.
Handle empty_strided_again(int64_t dim, const int64_t* size, const int64_t* stride, int32_t dtype,
                           int32_t device_index, const char* what);
void copy_again(AtenTensorHandle to, AtenTensorHandle from, const char* what);

// Raises torch.OutOfMemoryError with this text. Where this torch does not export what that takes,
// it raises an Error.
[[noreturn]] void raise_out_of_memory(const std::string& text);

// Runs code that loads and launches kernels.
template <class Launch>
void launching(Launch launch) {
  try {
    launch();
  } catch (const OutOfMemory& error) {
    raise_out_of_memory(error.what());
  }
}

}  // namespace fa4::aten
