// Defines the tensors of the glue code: owned handles of torch's stable C interface, and what is
// read from them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <utility>

#include "../core/launch/launch.h"
#include "strides.h"

namespace fa4::aten {

// Throws an Error where torch's function has failed.
void check_shim(AOTITorchError error, const char* what);

// Returns the error with which torch's C interface failed last. torch keeps that text to itself
// before 2.13: then the result is `otherwise`, and where to look.
std::string exception_text(const std::string& otherwise);

// Owns one reference. torch::stable::Tensor does so too, at the price of a shared_ptr.
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
  // Says whether a tensor argument was given.
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// Holds a tensor's metadata. Sizes and strides are borrowed from the tensor.
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

// Asks the function of strides.h about a tensor.
bool tma_can_address(const TensorInfo& tensor, int64_t byte_offset);

Handle empty_like(const TensorInfo& tensor);

// Holds the sizes and strides of attention's output as torch promises them: query's sizes, with
// value's as the last one.
struct OutputShape {
  int64_t size[kMaxDim], stride[kMaxDim];

  OutputShape(const TensorInfo& query, const TensorInfo& value);
  // Returns the metadata of an output with query's dtype and device.
  TensorInfo info(const TensorInfo& query) const;
};

Handle empty(const TensorInfo& shape);
// Allocates a contiguous CUDA tensor.
Handle empty(int64_t dim, const int64_t* size, int32_t dtype, int32_t device_index);
Handle undefined();
void fill(AtenTensorHandle tensor, double value);
// Puts `value` in place of every -inf.
void replace_negative_infinity(AtenTensorHandle tensor, double value);
// Returns the element of a contiguous tensor that lies at `offset`, as a tensor without dimensions.
Handle number_in(AtenTensorHandle tensor, int64_t offset);
// Returns the part of `tensor` that has `length` indices from `start` on in dimension `dim`.
Handle narrow(AtenTensorHandle tensor, int64_t dim, int64_t start, int64_t length);
// Returns the tensor with these sizes and strides in place of its own.
Handle reinterpret(AtenTensorHandle tensor, int64_t dim, const int64_t* size,
                   const int64_t* stride);
// Copies on the current stream. `what` names the step that failed.
void copy(AtenTensorHandle to, AtenTensorHandle from, const char* what);
// Returns a copy in memory of its own, which is aligned as allocations are.
Handle contiguous_copy(AtenTensorHandle tensor, const TensorInfo& info);

// kHeadsFirst is [batch, heads, seqlen, head_dim], as scaled_dot_product_attention has it;
// kSequenceFirst is [batch, seqlen, heads, head_dim].
enum class DimOrder { kHeadsFirst, kSequenceFirst };

TensorView view(AtenTensorHandle tensor, const TensorInfo& info, DimOrder order);

// Holds a tensor of 2-byte elements as the kernels can read it: the tensor itself, or a copy that
// lives as long as this object.
struct Readable {
  Handle copy;
  TensorView view;

  Readable(AtenTensorHandle tensor, const TensorInfo& given, DimOrder order);
};

// Holds a tensor of 2-byte elements as the kernels can write it: the tensor itself, or a copy that
// finish() copies back.
struct Writable {
  AtenTensorHandle tensor;
  Handle copy;
  TensorView view;

  Writable(AtenTensorHandle tensor, DimOrder order);
  // Returns what is written.
  AtenTensorHandle written() const { return copy ? copy.get() : tensor; }
  void finish();
};

}  // namespace fa4::aten
