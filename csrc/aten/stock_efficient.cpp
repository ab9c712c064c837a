#include "stock_efficient.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <algorithm>
#include <array>

#include "stock_run.h"

// A CPU build of torch lacks these functions.
#pragma weak aoti_torch_cuda__scaled_dot_product_efficient_attention
#pragma weak aoti_torch_cuda__scaled_dot_product_efficient_attention_backward

namespace fa4::aten {
namespace {

// There is a gradient of query, of key, of value and of attn_bias.
constexpr int64_t kGradients = 4;

// The gradients that are wanted, as the C function takes them and as the C++ function does.
struct Wanted {
  int32_t numbers[kGradients] = {};
  std::array<bool, kGradients> flags = {};

  explicit Wanted(const std::vector<bool>& given) {
    if (given.size() != kGradients)
      fail("grad_input_mask must have ", kGradients, " elements, has ", given.size());
    std::copy_n(given.begin(), kGradients, numbers);
    std::copy_n(given.begin(), kGradients, flags.begin());
  }
};

const Wanted& for_shim(const Wanted& wanted) { return wanted; }
const std::array<bool, kGradients>& for_cpp(const Wanted& wanted) { return wanted.flags; }

using FourTensors = std::tuple<TensorValue, TensorValue, TensorValue, TensorValue>;
using CppForward = FourTensors(Tensor, Tensor, Tensor, OptionalTensorArgument, bool, double, bool,
                               OptionalFloat);
using CppBackward = FourTensors(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                Tensor, double, std::array<bool, kGradients>, bool, OptionalFloat);

AOTITorchError backward_shim(Tensor grad_out, Tensor query, Tensor key, Tensor value,
                             Tensor attn_bias, Tensor out, Tensor logsumexp, Tensor philox_seed,
                             Tensor philox_offset, double dropout_p, const Wanted& wanted,
                             int32_t is_causal, double* scale, Tensor* grad_query, Tensor* grad_key,
                             Tensor* grad_value, Tensor* grad_bias) {
  return aoti_torch_cuda__scaled_dot_product_efficient_attention_backward(
      grad_out, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p,
      wanted.numbers, kGradients, is_causal, scale, grad_query, grad_key, grad_value, grad_bias);
}

}  // namespace

void efficient_forward(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppForward>(
      "_ZN2at4cuda39_scaled_dot_product_efficient_attentionERKNS_6TensorES3_S3_RKSt8optionalIS1_"
      "EbdbS4_IdE");
  run(stack, call.op, Sdpa::kOutside, &aoti_torch_cuda__scaled_dot_product_efficient_attention, cpp,
      call.query.get(), call.key.get(), call.value.get(), OptionalTensor(call.attn_bias),
      call.compute_log_sumexp, call.dropout_p, call.is_causal, call.scale);
}

void efficient_backward(const BackwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppBackward>(
      "_ZN2at4cuda48_scaled_dot_product_efficient_attention_backwardERKNS_6TensorES3_S3_S3_S3_S3_"
      "S3_S3_S3_dSt5arrayIbLm4EEbSt8optionalIdE");
  constexpr auto* shim = &backward_shim;
  const bool known = &aoti_torch_cuda__scaled_dot_product_efficient_attention_backward != nullptr;
  run(stack, call.op, Sdpa::kOutside, known ? shim : nullptr, cpp, call.grad_out.get(),
      call.query.get(), call.key.get(), call.value.get(), call.attn_bias.get(), call.out.get(),
      call.logsumexp.get(), call.rng_state.get(), call.unused.get(), call.dropout_p,
      Wanted(call.wanted), call.is_causal, call.scale);
}

}  // namespace fa4::aten
