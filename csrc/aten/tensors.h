// Tensors as the glue handles them: owned handles of torch's stable C interface, and what is read
// from them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <utility>

#include "../core/launch/launch.h"
#include "strides.h"

namespace fa4::aten {

void check_shim(AOTITorchError error, const char* what);  // throws Error

// What torch's C interface last failed with. Before torch 2.13 it keeps that to itself: then
// `otherwise`, and where to look.
std::string exception_text(const std::string& otherwise);

// Owns one reference. torch::stable::Tensor does too, at the price of a shared_ptr.
class Handle {
 public:
  Handle() = default;
  explicit Handle(AtenTensorHandle handle) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(other.release()) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Handle() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  explicit operator bool() const { return handle_ != nullptr; }  // a tensor argument was given

 private:
  AtenTensorHandle handle_ = nullptr;
};

// A tensor's metadata. Sizes and strides are borrowed from the tensor.
struct TensorInfo {
  int64_t dim = 0;
  const int64_t* size = nullptr;
  const int64_t* stride = nullptr;
  int32_t dtype = 0;
  int32_t device_type = 0;
  int32_t device_index = 0;
};

TensorInfo info(AtenTensorHandle tensor);
void* data(AtenTensorHandle tensor);
bool defined(AtenTensorHandle tensor);

// Asks strides.h's function about a tensor.
bool tma_can_address(const TensorInfo& tensor, int64_t byte_offset);

Handle empty_like(const TensorInfo& tensor);

// Sizes and strides of attention's output, as torch promises them: query's, but for the last
// dimension, value's.
struct OutputShape {
  int64_t size[kMaxDim], stride[kMaxDim];

  OutputShape(const TensorInfo& query, const TensorInfo& value);
  TensorInfo info(const TensorInfo& query) const;  // with query's dtype and device
};

Handle empty(const TensorInfo& shape);
Handle empty(int64_t dim, const int64_t* size, int32_t dtype,
             int32_t device_index);  // contiguous, CUDA
Handle undefined();
void fill(AtenTensorHandle tensor, double value);
Handle contiguous_copy(AtenTensorHandle tensor,
                       const TensorInfo& info);  // in memory of its own, aligned as allocations are

// [batch, heads, seqlen, head_dim], as scaled_dot_product_attention has it, or [batch, seqlen,
// heads, head_dim]
enum class DimOrder { kHeadsFirst, kSequenceFirst };

TensorView view(AtenTensorHandle tensor, const TensorInfo& info, DimOrder order);

// A tensor of 2-byte elements as the kernels can read it: itself, or a copy that lives as long as
// this.
struct Readable {
  Handle copy;
  TensorView view;

  Readable(AtenTensorHandle tensor, const TensorInfo& given, DimOrder order);
};

// A tensor of 2-byte elements as the kernels can write it: itself, or memory that finish() copies
// into it.
struct Writable {
  AtenTensorHandle tensor;
  Handle copy;
  TensorView view;

  Writable(AtenTensorHandle tensor, DimOrder order);
  void finish();
};

}  // namespace fa4::aten
