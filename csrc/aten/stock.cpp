#include "stock.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "../core/error.h"
#include "torch_errors.h"
#include "torch_symbol.h"

// A CPU build of torch lacks these functions.
#pragma weak aoti_torch_cuda__flash_attention_forward
#pragma weak aoti_torch_cuda__flash_attention_backward
#pragma weak aoti_torch_cuda__scaled_dot_product_flash_attention
#pragma weak aoti_torch_cuda__scaled_dot_product_flash_attention_backward

namespace fa4::aten {
namespace {

// The C function has had the 17 arguments of its schema since torch 2.12.
using ForwardV2 = AOTITorchError(AtenTensorHandle query, AtenTensorHandle key,
                                 AtenTensorHandle value, AtenTensorHandle* cum_seq_q,
                                 AtenTensorHandle* cum_seq_k, int64_t max_q, int64_t max_k,
                                 double dropout_p, int32_t is_causal, int32_t return_debug_mask,
                                 double* scale, int64_t* window_size_left,
                                 int64_t* window_size_right, AtenTensorHandle* seqused_k,
                                 AtenTensorHandle* alibi_slopes, AtenTensorHandle* block_table,
                                 int64_t* num_splits, AtenTensorHandle* ret0,
                                 AtenTensorHandle* ret1, AtenTensorHandle* ret2,
                                 AtenTensorHandle* ret3, AtenTensorHandle* ret4);

ForwardV2* forward_v2() {
  static const auto function =
      torch_function<ForwardV2>("libtorch_cuda.so", "aoti_torch_cuda__flash_attention_forward_v2");
  return function;
}

using ForwardInplaceV2 = AOTITorchError(AtenTensorHandle out, AtenTensorHandle query,
                                        AtenTensorHandle key, AtenTensorHandle value,
                                        AtenTensorHandle* cum_seq_q, AtenTensorHandle* cum_seq_k,
                                        int64_t max_q, int64_t max_k, double dropout_p,
                                        int32_t is_causal, int32_t return_debug_mask, double* scale,
                                        int64_t* window_size_left, int64_t* window_size_right,
                                        AtenTensorHandle* seqused_k, AtenTensorHandle* alibi_slopes,
                                        AtenTensorHandle* block_table, int64_t* num_splits,
                                        AtenTensorHandle* ret0);

ForwardInplaceV2* forward_inplace_v2() {
  static const auto function = torch_function<ForwardInplaceV2>(
      "libtorch_cuda.so", "aoti_torch_cuda__flash_attention_forward_no_dropout_inplace_v2");
  return function;
}

// These are the C++ functions behind the C ones. They raise torch's own errors, and they do not
// consult the dispatcher for the op itself either.
using Tensor = AtenTensorHandle;
using OptionalTensorArgument = const OptionalTensorValue&;
using OptionalFloat = std::optional<double>;
using OptionalInt = std::optional<int64_t>;
using ThreeTensors = std::tuple<TensorValue, TensorValue, TensorValue>;
using FiveTensors = std::tuple<TensorValue, TensorValue, TensorValue, TensorValue, TensorValue>;
using SdpaResults = std::tuple<TensorValue, TensorValue, TensorValue, TensorValue, int64_t, int64_t,
                               TensorValue, TensorValue, TensorValue>;

using CppSdpaForward = SdpaResults(Tensor, Tensor, Tensor, double, bool, bool, OptionalFloat);
using CppSdpaBackward = ThreeTensors(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                     int64_t, int64_t, double, bool, Tensor, Tensor, OptionalFloat);
using CppForward = FiveTensors(Tensor, Tensor, Tensor, OptionalTensorArgument,
                               OptionalTensorArgument, int64_t, int64_t, double, bool, bool,
                               OptionalFloat, OptionalInt, OptionalInt, OptionalTensorArgument,
                               OptionalTensorArgument);
using CppForwardV2 = FiveTensors(Tensor, Tensor, Tensor, OptionalTensorArgument,
                                 OptionalTensorArgument, int64_t, int64_t, double, bool, bool,
                                 OptionalFloat, OptionalInt, OptionalInt, OptionalTensorArgument,
                                 OptionalTensorArgument, OptionalTensorArgument, OptionalInt);
using CppForwardInplaceV2 = TensorValue(Tensor, Tensor, Tensor, Tensor, OptionalTensorArgument,
                                        OptionalTensorArgument, int64_t, int64_t, double, bool,
                                        bool, OptionalFloat, OptionalInt, OptionalInt,
                                        OptionalTensorArgument, OptionalTensorArgument,
                                        OptionalTensorArgument, OptionalInt);
using CppBackward = ThreeTensors(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 int64_t, int64_t, double, bool, Tensor, Tensor, OptionalFloat,
                                 OptionalInt, OptionalInt);

template <class Function>
Function* cpp_function(const char* name) {
  return torch_function<Function>("libtorch_cuda.so", name);
}

// Says where the calling thread is with a stock scaled_dot_product op.
enum class Sdpa { kOutside, kFirstTime, kAgain };
thread_local Sdpa sdpa = Sdpa::kOutside;

class Stage {
 public:
  explicit Stage(Sdpa stage) : before_(std::exchange(sdpa, stage)) {}
  ~Stage() { sdpa = before_; }

 private:
  Sdpa before_;
};

// Runs the C function with the thread at `stage` and returns whether it succeeded. If not, the
// caller runs the C++ function, which raises torch's own error. Inside a scaled_dot_product op the
// outer C function would catch that error, so this throws instead; the outer op is then called
// again through C++, and this time the error passes.
template <class Shim, class Cpp, class... Arguments>
bool done(const char* op, Sdpa stage, Shim* shim, Cpp* cpp, Arguments... arguments) {
  if (!shim) fail(op, ": this build of torch has no CUDA kernel for it");
  if (sdpa == Sdpa::kAgain && cpp) return false;
  const auto error = [&] {
    const Stage scope(stage);
    return shim(arguments...);
  }();
  if (error == AOTI_TORCH_SUCCESS) return true;
  if (sdpa == Sdpa::kFirstTime || !cpp)
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
int32_t for_shim(bool& value) { return value; }
template <class T>
T* for_shim(std::optional<T>& value) {
  return value ? &*value : nullptr;
}
AtenTensorHandle* for_shim(OptionalTensor& tensor) {
  return tensor.handle ? &tensor.handle : nullptr;
}

// The C++ functions take the same arguments in this form.
template <class T>
const T& for_cpp(const T& value) {
  return value;
}
OptionalTensorValue for_cpp(const OptionalTensor& tensor) {
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

void put(StableIValue* stack, TensorValue& value) { *stack = give(value.take()); }

void put_all(StableIValue* stack, TensorValue&& result) { put(stack, result); }

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
    return done(op, stage, shim, cpp, for_shim(arguments)..., &result...);
  };
  if (std::apply(call_shim, results)) return put_all(stack, std::move(results));
  const Stage scope(stage == Sdpa::kFirstTime ? Sdpa::kAgain : stage);
  // This call may succeed, for example because memory has been freed since.
  put_all(stack, cpp(for_cpp(arguments)...));
}

void sdpa_forward(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppSdpaForward>(
      "_ZN2at4cuda35_scaled_dot_product_flash_attentionERKNS_6TensorES3_S3_dbbSt8optionalIdE");
  run(stack, call.op, Sdpa::kFirstTime, &aoti_torch_cuda__scaled_dot_product_flash_attention, cpp,
      call.query.get(), call.key.get(), call.value.get(), call.dropout_p, call.is_causal,
      call.return_debug_mask, call.scale);
}

void flash_forward_v1(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppForward>(
      "_ZN2at4cuda24_flash_attention_forwardERKNS_6TensorES3_S3_RKSt8optionalIS1_ES7_lldbbS4_IdES4_"
      "IlES9_S7_S7_");
  run(stack, call.op, sdpa, &aoti_torch_cuda__flash_attention_forward, cpp, call.query.get(),
      call.key.get(), call.value.get(), OptionalTensor(call.cum_seq_q),
      OptionalTensor(call.cum_seq_k), call.max_q, call.max_k, call.dropout_p, call.is_causal,
      call.return_debug_mask, call.scale, call.window_size_left, call.window_size_right,
      OptionalTensor(call.seqused_k), OptionalTensor(call.alibi_slopes));
}

void flash_forward_v2(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppForwardV2>(
      "_ZN2at4cuda24_flash_attention_forwardERKNS_6TensorES3_S3_RKSt8optionalIS1_ES7_lldbbS4_IdES4_"
      "IlES9_S7_S7_S7_S9_");
  run(stack, call.op, sdpa, forward_v2(), cpp, call.query.get(), call.key.get(), call.value.get(),
      OptionalTensor(call.cum_seq_q), OptionalTensor(call.cum_seq_k), call.max_q, call.max_k,
      call.dropout_p, call.is_causal, call.return_debug_mask, call.scale, call.window_size_left,
      call.window_size_right, OptionalTensor(call.seqused_k), OptionalTensor(call.alibi_slopes),
      OptionalTensor(call.block_table), call.num_splits);
}

void sdpa_backward(const BackwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppSdpaBackward>(
      "_ZN2at4cuda44_scaled_dot_product_flash_attention_backwardERKNS_6TensorES3_S3_S3_S3_S3_S3_S3_"
      "lldbS3_S3_St8optionalIdE");
  run(stack, call.op, Sdpa::kFirstTime,
      &aoti_torch_cuda__scaled_dot_product_flash_attention_backward, cpp, call.grad_out.get(),
      call.query.get(), call.key.get(), call.value.get(), call.out.get(), call.logsumexp.get(),
      call.cum_seq_q.get(), call.cum_seq_k.get(), call.max_q, call.max_k, call.dropout_p,
      call.is_causal, call.rng_state.get(), call.unused.get(), call.scale);
}

void flash_backward(const BackwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppBackward>(
      "_ZN2at4cuda25_flash_attention_backwardERKNS_6TensorES3_S3_S3_S3_S3_S3_S3_lldbS3_S3_"
      "St8optionalIdES4_IlES6_");
  run(stack, call.op, sdpa, &aoti_torch_cuda__flash_attention_backward, cpp, call.grad_out.get(),
      call.query.get(), call.key.get(), call.value.get(), call.out.get(), call.logsumexp.get(),
      call.cum_seq_q.get(), call.cum_seq_k.get(), call.max_q, call.max_k, call.dropout_p,
      call.is_causal, call.rng_state.get(), call.unused.get(), call.scale, call.window_size_left,
      call.window_size_right);
}

}  // namespace

bool stock_is_running() { return sdpa != Sdpa::kOutside; }

void stock_forward(const ForwardCall& call, StableIValue* stack) {
  if (call.order == DimOrder::kHeadsFirst) return sdpa_forward(call, stack);
  call.has_block_table ? flash_forward_v2(call, stack) : flash_forward_v1(call, stack);
}

void stock_forward_inplace(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppForwardInplaceV2>(
      "_ZN2at4cuda43_flash_attention_forward_no_dropout_inplaceERNS_6TensorERKS1_S4_S4_"
      "RKSt8optionalIS1_ES8_lldbbS5_IdES5_IlESA_S8_"
      "S8_S8_SA_");
  run(stack, call.op, sdpa, forward_inplace_v2(), cpp, call.out.get(), call.query.get(),
      call.key.get(), call.value.get(), OptionalTensor(call.cum_seq_q),
      OptionalTensor(call.cum_seq_k), call.max_q, call.max_k, call.dropout_p, call.is_causal,
      call.return_debug_mask, call.scale, call.window_size_left, call.window_size_right,
      OptionalTensor(call.seqused_k), OptionalTensor(call.alibi_slopes),
      OptionalTensor(call.block_table), call.num_splits);
}

void stock_backward(const BackwardCall& call, StableIValue* stack) {
  call.order == DimOrder::kHeadsFirst ? sdpa_backward(call, stack) : flash_backward(call, stack);
}

}  // namespace fa4::aten
