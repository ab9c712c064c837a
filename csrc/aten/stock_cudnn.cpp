#include "stock_cudnn.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "stock_run.h"

// A CPU build of torch lacks these functions.
#pragma weak aoti_torch_cuda__scaled_dot_product_cudnn_attention
#pragma weak aoti_torch_cuda__scaled_dot_product_cudnn_attention_backward

namespace fa4::aten {
namespace {

using CppSdpaForward = SdpaResults(Tensor, Tensor, Tensor, OptionalTensorArgument, bool, double,
                                   bool, bool, OptionalFloat);
using CppForward = SdpaResults(Tensor, Tensor, Tensor, OptionalTensorArgument,
                               OptionalTensorArgument, OptionalTensorArgument, int64_t, int64_t,
                               bool, double, bool, bool, OptionalFloat);
using CppForwardV2 = SdpaResults(Tensor, Tensor, Tensor, OptionalTensorArgument,
                                 OptionalTensorArgument, OptionalTensorArgument, int64_t, int64_t,
                                 bool, double, bool, bool, OptionalFloat, OptionalTensorArgument,
                                 OptionalTensorArgument);
using CppForwardInplace = TensorValue(Tensor, Tensor, Tensor, Tensor, Tensor,
                                      OptionalTensorArgument, int64_t, int64_t, bool, OptionalFloat,
                                      OptionalTensorArgument, OptionalTensorArgument);
// Both backward ops have this type.
using CppBackward = ThreeTensors(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, Tensor, Tensor, int64_t, int64_t, double, bool,
                                 OptionalFloat);

void sdpa_forward(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppSdpaForward>(
      "_ZN2at4cuda35_scaled_dot_product_cudnn_attentionERKNS_6TensorES3_S3_RKSt8optionalIS1_"
      "EbdbbS4_IdE");
  run(stack, call.op, Sdpa::kFirstTime, &aoti_torch_cuda__scaled_dot_product_cudnn_attention, cpp,
      call.query.get(), call.key.get(), call.value.get(), OptionalTensor(call.attn_bias),
      call.compute_log_sumexp, call.dropout_p, call.is_causal, call.return_debug_mask, call.scale);
}

void low_level_forward_v1(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppForward>(
      "_ZN2at4cuda24_cudnn_attention_forwardERKNS_6TensorES3_S3_RKSt8optionalIS1_ES7_S7_llbdbbS4_"
      "IdE");
  run_cpp(stack, call.op, cpp, call.query.get(), call.key.get(), call.value.get(),
          OptionalTensor(call.attn_bias), OptionalTensor(call.cum_seq_q),
          OptionalTensor(call.cum_seq_k), call.max_q, call.max_k, call.compute_log_sumexp,
          call.dropout_p, call.is_causal, call.return_debug_mask, call.scale);
}

void low_level_forward_v2(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppForwardV2>(
      "_ZN2at4cuda24_cudnn_attention_forwardERKNS_6TensorES3_S3_RKSt8optionalIS1_ES7_S7_llbdbbS4_"
      "IdES7_S7_");
  run_cpp(stack, call.op, cpp, call.query.get(), call.key.get(), call.value.get(),
          OptionalTensor(call.attn_bias), OptionalTensor(call.cum_seq_q),
          OptionalTensor(call.cum_seq_k), call.max_q, call.max_k, call.compute_log_sumexp,
          call.dropout_p, call.is_causal, call.return_debug_mask, call.scale,
          OptionalTensor(call.seqused_k), OptionalTensor(call.block_table));
}

void sdpa_backward(const BackwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppBackward>(
      "_ZN2at4cuda44_scaled_dot_product_cudnn_attention_backwardERKNS_6TensorES3_S3_S3_S3_S3_S3_S3_"
      "S3_S3_S3_lldbSt8optionalIdE");
  run(stack, call.op, Sdpa::kFirstTime,
      &aoti_torch_cuda__scaled_dot_product_cudnn_attention_backward, cpp, call.grad_out.get(),
      call.query.get(), call.key.get(), call.value.get(), call.out.get(), call.logsumexp.get(),
      call.rng_state.get(), call.unused.get(), call.attn_bias.get(), call.cum_seq_q.get(),
      call.cum_seq_k.get(), call.max_q, call.max_k, call.dropout_p, call.is_causal, call.scale);
}

void low_level_backward(const BackwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppBackward>(
      "_ZN2at4cuda25_cudnn_attention_backwardERKNS_6TensorES3_S3_S3_S3_S3_S3_S3_S3_S3_S3_"
      "lldbSt8optionalIdE");
  run_cpp(stack, call.op, cpp, call.grad_out.get(), call.query.get(), call.key.get(),
          call.value.get(), call.out.get(), call.logsumexp.get(), call.rng_state.get(),
          call.unused.get(), call.attn_bias.get(), call.cum_seq_q.get(), call.cum_seq_k.get(),
          call.max_q, call.max_k, call.dropout_p, call.is_causal, call.scale);
}

}  // namespace

void cudnn_forward(const ForwardCall& call, StableIValue* stack) {
  if (!call.is_low_level) return sdpa_forward(call, stack);
  call.has_block_table ? low_level_forward_v2(call, stack) : low_level_forward_v1(call, stack);
}

void cudnn_forward_inplace(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppForwardInplace>(
      "_ZN2at4cuda43_cudnn_attention_forward_no_dropout_inplaceERNS_6TensorERKS1_S4_S4_S4_"
      "RKSt8optionalIS1_EllbS5_IdES8_S8_");
  run_cpp(stack, call.op, cpp, call.out.get(), call.query.get(), call.key.get(), call.value.get(),
          call.cum_seq_q.get(), OptionalTensor(call.cum_seq_k), call.max_q, call.max_k,
          call.is_causal, call.scale, OptionalTensor(call.seqused_k),
          OptionalTensor(call.block_table));
}

void cudnn_backward(const BackwardCall& call, StableIValue* stack) {
  call.is_low_level ? low_level_backward(call, stack) : sdpa_backward(call, stack);
}

}  // namespace fa4::aten
