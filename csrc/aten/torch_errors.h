// torch's own errors, which its C interface keeps from us: each of its functions catches what torch
// throws and returns a code, and a program would get a RuntimeError where torch raises
// torch.OutOfMemoryError, ValueError or NotImplementedError. So a call that has failed is made once
// more through the exported C++ function behind it, which lets the exception pass. Calls that
// succeed go through the stable interface, but for allocations (cuda_memory.h); where a torch lacks
// the function, under the mangled name that holds its parameters' types, the error stays a
// RuntimeError. The types below are how C++ passes torch's in registers and memory, with the tests
// to hold them to it: at::Tensor is one counted pointer, as AtenTensorHandle, which points to one,
// has it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "../core/error.h"
#include "tensors.h"

namespace fa4::aten {

// An at::Tensor that a C++ function returns.
class TensorValue {
 public:
  TensorValue(const TensorValue&) = delete;
  TensorValue& operator=(const TensorValue&) = delete;
  ~TensorValue() { take(); }

  Handle take();  // leaves an undefined tensor

 private:
  void* impl_;
};

// A const std::optional<at::Tensor>& argument, borrowed from a handle that may be null.
struct OptionalTensorValue {
  void* impl;
  bool given;

  explicit OptionalTensorValue(AtenTensorHandle handle)
      : impl(handle ? *reinterpret_cast<void**>(handle) : nullptr), given(handle != nullptr) {}
};

struct DeviceValue {  // c10::Device
  int8_t type, index;
};

inline DeviceValue cuda_device(int32_t index) {
  return {static_cast<int8_t>(aoti_torch_device_type_cuda()), static_cast<int8_t>(index)};
}

// Each makes a call again that failed with its C function. `what` is for the error of a torch that
// lacks the C++ function.
Handle empty_strided_again(int64_t dim, const int64_t* size, const int64_t* stride, int32_t dtype,
                           int32_t device_index, const char* what);
void copy_again(AtenTensorHandle to, AtenTensorHandle from, const char* what);

// Raises torch.OutOfMemoryError with this text, or where this torch does not export what that
// takes, an Error.
[[noreturn]] void raise_out_of_memory(const std::string& text);

// Runs what loads and launches kernels.
template <class Launch>
void launching(Launch launch) {
  try {
    launch();
  } catch (const OutOfMemory& error) {
    raise_out_of_memory(error.what());
  }
}

}  // namespace fa4::aten
