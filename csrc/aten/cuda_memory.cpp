#include "cuda_memory.h"

#include <optional>

#include "torch_errors.h"
#include "torch_symbol.h"

namespace fa4::aten {
namespace {

struct IntList {  // This is c10::ArrayRef<int64_t>.
  const int64_t* data;
  size_t size;
};

// This is the type of at::detail::empty_strided_cuda.
using EmptyStridedCuda = TensorValue(IntList size, IntList stride, int8_t dtype,
                                     std::optional<DeviceValue> device);

}  // namespace

Handle empty_cuda(int64_t dim, const int64_t* size, const int64_t* stride, int32_t dtype,
                  int32_t device_index) {
  static const auto function =
      torch_function<EmptyStridedCuda>("libtorch_cuda.so",
                                       "_ZN2at6detail18empty_strided_cudaEN3c108ArrayRefIlEES3_NS1_"
                                       "10ScalarTypeESt8optionalINS1_6DeviceEE");
  if (!function) return Handle();
  const auto length = static_cast<size_t>(dim);
  return function({size, length}, {stride, length}, static_cast<int8_t>(dtype),
                  cuda_device(device_index))
      .take();
}

}  // namespace fa4::aten
