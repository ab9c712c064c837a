// Calls the stock kernels of any family of ops: through torch's C function, and again through the
// C++ function behind it where the first call fails, so that torch raises its own error.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../core/error.h"
#include "calls.h"
#include "torch_errors.h"
#include "torch_symbol.h"

namespace fa4::aten {

// Types of the C++ functions behind the C ones. These raise torch's own errors, and do not consult
// the dispatcher for the op itself either.
using Tensor = AtenTensorHandle;
using OptionalTensorArgument = const OptionalTensorValue&;
using OptionalFloat = std::optional<double>;
using OptionalInt = std::optional<int64_t>;
using ThreeTensors = std::tuple<TensorValue, TensorValue, TensorValue>;
using FiveTensors = std::tuple<TensorValue, TensorValue, TensorValue, TensorValue, TensorValue>;
using SdpaResults = std::tuple<TensorValue, TensorValue, TensorValue, TensorValue, int64_t, int64_t,
                               TensorValue, TensorValue, TensorValue>;

template <class Function>
Function* cpp_function(const char* name) {
  return torch_function<Function>("libtorch_cuda.so", name);
}

// Says where the calling thread is with a stock scaled_dot_product op.
enum class Sdpa { kOutside, kFirstTime, kAgain };
Sdpa& sdpa_stage();

class Stage {
 public:
  explicit Stage(Sdpa stage) : before_(std::exchange(sdpa_stage(), stage)) {}
  ~Stage() { sdpa_stage() = before_; }

 private:
  Sdpa before_;
};

// Runs the C function with the thread at `stage` and returns whether it succeeded. If not, the
// caller runs the C++ function, which raises torch's own error. Inside a scaled_dot_product op the
// outer C function would catch that error, so this throws instead; the outer op is then called
// again through C++, and this time the error passes.
template <class Shim, class Cpp, class... Arguments>
bool shim_succeeded(const char* op, Sdpa stage, Shim* shim, Cpp* cpp, Arguments... arguments) {
  if (!shim) fail(op, ": this build of torch has no CUDA kernel for it");
  if (sdpa_stage() == Sdpa::kAgain && cpp) return false;
  const auto error = [&] {
    const Stage scope(stage);
    return shim(arguments...);
  }();
  if (error == AOTI_TORCH_SUCCESS) return true;
  if (sdpa_stage() == Sdpa::kFirstTime || !cpp)
    fail(exception_text(concat(op, ": the stock kernel raised an error")));
  return false;
}

// This is an argument of type Tensor? in the schema.
struct OptionalTensor {
  AtenTensorHandle handle;
  explicit OptionalTensor(const Handle& tensor) : handle(tensor.get()) {}
};

// The C functions take these arguments. An optional one is a pointer that may be null.
template <class T>
T for_shim(T& value) {
  return value;
}
inline int32_t for_shim(bool& value) { return value; }
template <class T>
T* for_shim(std::optional<T>& value) {
  return value ? &*value : nullptr;
}
inline AtenTensorHandle* for_shim(OptionalTensor& tensor) {
  return tensor.handle ? &tensor.handle : nullptr;
}

// The C++ functions take the same arguments in this form.
template <class T>
const T& for_cpp(const T& value) {
  return value;
}
inline OptionalTensorValue for_cpp(const OptionalTensor& tensor) {
  return OptionalTensorValue(tensor.handle);
}

// Maps the results of a C++ function to the values that the C function fills in.
template <class Results>
struct FromShim;
template <>
struct FromShim<TensorValue> {
  using Results = std::tuple<AtenTensorHandle>;
};
template <class... Values>
struct FromShim<std::tuple<Values...>> {
  using Results = std::tuple<
      std::conditional_t<std::is_same_v<Values, TensorValue>, AtenTensorHandle, Values>...>;
};

template <class T>
void put(StableIValue* stack, T& value) {
  *stack = torch::stable::detail::from(value);
}

inline void put(StableIValue* stack, TensorValue& value) { *stack = give(value.take()); }

inline void put_all(StableIValue* stack, TensorValue&& result) { put(stack, result); }

template <class... Values>
void put_all(StableIValue* stack, std::tuple<Values...>&& results) {
  std::apply([&](auto&... value) { (put(stack++, value), ...); }, results);
}

// Puts the results of a stock op on the stack. It calls the C function and, if that fails, the C++
// function. The thread is at `stage` while the op runs.
template <class Shim, class Results, class... Parameters, class... Arguments>
void run(StableIValue* stack, const char* op, Sdpa stage, Shim* shim, Results (*cpp)(Parameters...),
         Arguments... arguments) {
  typename FromShim<Results>::Results results;
  const auto call_shim = [&](auto&... result) {
    return shim_succeeded(op, stage, shim, cpp, for_shim(arguments)..., &result...);
  };
  if (std::apply(call_shim, results)) return put_all(stack, std::move(results));
  const Stage scope(stage == Sdpa::kFirstTime ? Sdpa::kAgain : stage);
  // This call may succeed, for example because memory has been freed since.
  put_all(stack, cpp(for_cpp(arguments)...));
}

// The same for an op that has no C function.
template <class Results, class... Parameters, class... Arguments>
void run_cpp(StableIValue* stack, const char* op, Results (*cpp)(Parameters...),
             Arguments... arguments) {
  if (!cpp) fail(op, ": this build of torch has no CUDA kernel for it");
  put_all(stack, cpp(for_cpp(arguments)...));
}

}  // namespace fa4::aten
