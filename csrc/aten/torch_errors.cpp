#include "torch_errors.h"

#include <cxxabi.h>

#include <exception>
#include <typeinfo>
#include <utility>

#include "torch_symbol.h"

namespace fa4::aten {
namespace {

constexpr const char* kTorchCpu = "libtorch_cpu.so";

// This is c10::ArrayRef<c10::SymInt>. A SymInt that is a plain number holds that number.
struct SymIntList {
  const int64_t* data;
  size_t size;
};

// This is the type of at::_ops::empty_strided::call.
using EmptyStrided = TensorValue(SymIntList size, SymIntList stride, std::optional<int8_t> dtype,
                                 std::optional<int8_t> layout, std::optional<DeviceValue> device,
                                 std::optional<bool> pin_memory);

// This is the type of at::_ops::copy_::call.
using Copy = void*(AtenTensorHandle to, AtenTensorHandle from, bool non_blocking);

[[noreturn]] void fail_with_text(const char* what) {
  fail(exception_text(concat(what, " failed")));
}

struct SourceLocation {  // This is c10::SourceLocation.
  const char *function, *file;
  uint32_t line;
};

// c10::OutOfMemoryError adds nothing to c10::Error but its type. Before torch 2.13 its vtable is in
// libc10_cuda.
struct OutOfMemoryClass {
  void (*construct_error)(void* memory, SourceLocation, std::string text) = nullptr;
  void** vtable = nullptr;
  std::type_info* type = nullptr;

  explicit operator bool() const { return construct_error && vtable && type; }
};

OutOfMemoryClass find_out_of_memory_class() {
  OutOfMemoryClass found;
  found.construct_error = torch_function<void(void*, SourceLocation, std::string)>(
      "libc10.so",
      "_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE");
  for (const char* library : {"libc10.so", "libc10_cuda.so"}) {
    if (found.vtable) break;
    found.vtable = static_cast<void**>(torch_symbol(library, "_ZTVN3c1016OutOfMemoryErrorE"));
    found.type =
        static_cast<std::type_info*>(torch_symbol(library, "_ZTIN3c1016OutOfMemoryErrorE"));
  }
  return found;
}

}  // namespace

TensorValue::~TensorValue() {
  if (!impl_) return;
  try {
    take();
  } catch (const std::exception&) {
    // No handle could be made to release the tensor by. Its memory is lost, the process goes on.
  }
}

// An undefined tensor holds no counted reference, so overwriting it is safe.
Handle TensorValue::take() {
  Handle handle = undefined();
  *reinterpret_cast<void**>(handle.get()) = std::exchange(impl_, nullptr);
  return handle;
}

Handle empty_strided_again(int64_t dim, const int64_t* size, const int64_t* stride, int32_t dtype,
                           int32_t device_index, const char* what) {
  const auto function = torch_function<EmptyStrided>(
      kTorchCpu,
      "_ZN2at4_ops13empty_strided4callEN3c108ArrayRefINS2_6SymIntEEES5_St8optionalINS2_"
      "10ScalarTypeEES6_INS2_6LayoutEES6_INS2_"
      "6DeviceEES6_IbE");
  if (!function) fail_with_text(what);
  const auto length = static_cast<size_t>(dim);
  TensorValue tensor = function({size, length}, {stride, length}, static_cast<int8_t>(dtype),
                                std::nullopt, cuda_device(device_index), std::nullopt);
  return tensor.take();
}

void copy_again(AtenTensorHandle to, AtenTensorHandle from, const char* what) {
  const auto function =
      torch_function<Copy>(kTorchCpu, "_ZN2at4_ops5copy_4callERNS_6TensorERKS2_b");
  if (!function) fail_with_text(what);
  function(to, from, false);
}

void raise_out_of_memory(const std::string& text) {
  static const OutOfMemoryClass found = find_out_of_memory_class();
  if (!found) fail(text);
  // c10::Error takes 128 bytes in torch 2.13.
  constexpr size_t kMemory = 1024;
  // The destructor comes first, after the offset to the top and the type.
  constexpr int kFirstFunction = 2;
  void* error = abi::__cxa_allocate_exception(kMemory);
  found.construct_error(error, {"launch", "fa4_ext", 0}, text);
  *static_cast<void***>(error) = found.vtable + kFirstFunction;
  abi::__cxa_throw(error, found.type,
                   reinterpret_cast<void (*)(void*)>(found.vtable[kFirstFunction]));
}

}  // namespace fa4::aten
