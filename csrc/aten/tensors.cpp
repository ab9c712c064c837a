#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "../core/error.h"
#include "cuda_memory.h"
#include "torch_errors.h"
#include "torch_symbol.h"

namespace fa4::aten {
namespace {

Handle empty_strided(int64_t dim, const int64_t* size, const int64_t* stride, int32_t dtype,
                     int32_t device_index) {
  if (Handle tensor = empty_cuda(dim, size, stride, dtype, device_index)) return tensor;
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(dim, size, stride, dtype, aoti_torch_device_type_cuda(),
                               device_index, &handle) != AOTI_TORCH_SUCCESS) {
    return empty_strided_again(dim, size, stride, dtype, device_index,
                               "CUDA out of memory. Allocating a tensor");
  }
  return Handle(handle);
}

bool repeats_elements(const TensorInfo& tensor) {
  for (int64_t d = 0; d < tensor.dim; ++d) {
    if (tensor.size[d] > 1 && tensor.stride[d] == 0) return true;
  }
  return false;
}

}  // namespace

void check_shim(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) fail(exception_text(concat(what, " failed")));
}

std::string exception_text(const std::string& otherwise) {
  static const auto get_what = torch_function<const char*()>(
      "libtorch_cpu.so", "torch_exception_get_what_without_backtrace");
  return get_what ? get_what() : concat(otherwise, "; torch's message is on stderr");
}

TensorInfo info(AtenTensorHandle tensor) {
  TensorInfo info;
  int64_t *size, *stride;
  check_shim(aoti_torch_get_dim(tensor, &info.dim), "reading a tensor's rank");
  check_shim(aoti_torch_get_sizes(tensor, &size), "reading a tensor's sizes");
  check_shim(aoti_torch_get_strides(tensor, &stride), "reading a tensor's strides");
  check_shim(aoti_torch_get_dtype(tensor, &info.dtype), "reading a tensor's dtype");
  check_shim(aoti_torch_get_device_type(tensor, &info.device_type), "reading a tensor's device");
  check_shim(aoti_torch_get_device_index(tensor, &info.device_index), "reading a tensor's device");
  info.size = size;
  info.stride = stride;
  return info;
}

void* data(AtenTensorHandle tensor) {
  void* pointer;
  check_shim(aoti_torch_get_data_ptr(tensor, &pointer), "reading a tensor's address");
  return pointer;
}

bool defined(AtenTensorHandle tensor) {
  bool result;
  check_shim(aoti_torch_is_defined(tensor, &result), "asking whether a tensor is defined");
  return result;
}

bool tma_can_address(const TensorInfo& tensor, int64_t byte_offset) {
  return fa4::tma_can_address(tensor.dim, tensor.size, tensor.stride, byte_offset);
}

Handle empty_like(const TensorInfo& tensor) {
  int64_t stride[kMaxDim];
  empty_like_strides(tensor.dim, tensor.size, tensor.stride, stride);
  return empty_strided(tensor.dim, tensor.size, stride, tensor.dtype, tensor.device_index);
}

OutputShape::OutputShape(const TensorInfo& query, const TensorInfo& value) {
  const int64_t last = query.dim - 1;
  std::copy_n(query.size, last, size);
  // In pages value has one dimension more than query.
  size[last] = value.size[value.dim - 1];
  if (size[last] == query.size[last]) {
    empty_like_strides(query.dim, query.size, query.stride, stride);
  } else {
    output_strides(query.dim, size, query.stride, stride);
  }
}

TensorInfo OutputShape::info(const TensorInfo& query) const {
  return {query.dim, size, stride, query.dtype, query.device_type, query.device_index};
}

Handle empty(const TensorInfo& shape) {
  return empty_strided(shape.dim, shape.size, shape.stride, shape.dtype, shape.device_index);
}

Handle empty(int64_t dim, const int64_t* size, int32_t dtype, int32_t device_index) {
  int64_t stride[kMaxDim];
  contiguous_strides(dim, size, stride);
  return empty_strided(dim, size, stride, dtype, device_index);
}

Handle undefined() {
  AtenTensorHandle handle;
  check_shim(aoti_torch_new_uninitialized_tensor(&handle), "making an undefined tensor");
  return Handle(handle);
}

void fill(AtenTensorHandle tensor, double value) {
  check_shim(aoti_torch_aten_fill__Scalar(tensor, value), "filling a tensor");
}

void replace_negative_infinity(AtenTensorHandle tensor, double value) {
  using Limits = std::numeric_limits<double>;
  const auto given = [](double number) {
    return torch::stable::detail::from(std::optional<double>(number));
  };
  AtenTensorHandle argument;
  check_shim(aoti_torch_new_tensor_handle(tensor, &argument), "passing a tensor on");
  // nan, posinf and neginf: the first two stay.
  StableIValue stack[] = {torch::stable::detail::from(argument), given(Limits::quiet_NaN()),
                          given(Limits::infinity()), given(value)};
  check_shim(torch_call_dispatcher("aten::nan_to_num_", "", stack, TORCH_ABI_VERSION),
             "replacing numbers in a tensor");
  const Handle result(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
}

Handle number_in(AtenTensorHandle tensor, int64_t offset) {
  AtenTensorHandle number;
  check_shim(aoti_torch__reinterpret_tensor(tensor, 0, nullptr, nullptr, offset, &number),
             "taking a number out of a tensor");
  return Handle(number);
}

Handle reinterpret(AtenTensorHandle tensor, int64_t dim, const int64_t* size,
                   const int64_t* stride) {
  AtenTensorHandle result;
  check_shim(aoti_torch__reinterpret_tensor(tensor, dim, size, stride, 0, &result),
             "viewing a tensor in another shape");
  return Handle(result);
}

void copy(AtenTensorHandle to, AtenTensorHandle from, const char* what) {
  if (aoti_torch_copy_(to, from, 0) != AOTI_TORCH_SUCCESS) copy_again(to, from, what);
}

Handle narrow(AtenTensorHandle tensor, int64_t dim, int64_t start, int64_t length) {
  AtenTensorHandle part;
  check_shim(aoti_torch_aten_narrow(tensor, dim, start, length, &part), "narrowing a tensor");
  return Handle(part);
}

Handle contiguous_copy(AtenTensorHandle tensor, const TensorInfo& info) {
  Handle result = empty(info.dim, info.size, info.dtype, info.device_index);
  copy(result.get(), tensor, "copying a tensor");
  return result;
}

TensorView view(AtenTensorHandle tensor, const TensorInfo& info, DimOrder order) {
  TensorView view;
  view.data = data(tensor);
  for (int64_t d = 0; d < info.dim; ++d) {
    const int64_t from = order == DimOrder::kHeadsFirst && (d == 1 || d == 2) ? 3 - d : d;
    view.size[d] = info.size[from];
    view.stride[d] = info.stride[from];
  }
  return view;
}

Readable::Readable(AtenTensorHandle tensor, const TensorInfo& given, DimOrder order) {
  if (tma_can_address(given, reinterpret_cast<int64_t>(data(tensor)))) {
    view = aten::view(tensor, given, order);
  } else {
    copy = contiguous_copy(tensor, given);
    view = aten::view(copy.get(), info(copy.get()), order);
  }
}

Writable::Writable(AtenTensorHandle tensor, DimOrder order) : tensor(tensor) {
  TensorInfo given = info(tensor);
  if (!tma_can_address(given, reinterpret_cast<int64_t>(data(tensor))) || repeats_elements(given)) {
    copy = contiguous_copy(tensor, given);  // rows behind the last sequence keep what they hold
    given = info(copy.get());
  }
  view = aten::view(written(), given, order);
}

// Copies into the tensor. Where that cannot be written, PyTorch raises its error.
void Writable::finish() {
  if (copy) aten::copy(tensor, copy.get(), "copying into out");
}

}  // namespace fa4::aten
