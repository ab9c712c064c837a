#include "stock_flash.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "stock_run.h"

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

void sdpa_forward(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppSdpaForward>(
      "_ZN2at4cuda35_scaled_dot_product_flash_attentionERKNS_6TensorES3_S3_dbbSt8optionalIdE");
  run(stack, call.op, Sdpa::kFirstTime, &aoti_torch_cuda__scaled_dot_product_flash_attention, cpp,
      call.query.get(), call.key.get(), call.value.get(), call.dropout_p, call.is_causal,
      call.return_debug_mask, call.scale);
}

void low_level_forward_v1(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppForward>(
      "_ZN2at4cuda24_flash_attention_forwardERKNS_6TensorES3_S3_RKSt8optionalIS1_ES7_lldbbS4_IdES4_"
      "IlES9_S7_S7_");
  run(stack, call.op, sdpa_stage(), &aoti_torch_cuda__flash_attention_forward, cpp,
      call.query.get(), call.key.get(), call.value.get(), OptionalTensor(call.cum_seq_q),
      OptionalTensor(call.cum_seq_k), call.max_q, call.max_k, call.dropout_p, call.is_causal,
      call.return_debug_mask, call.scale, call.window_size_left, call.window_size_right,
      OptionalTensor(call.seqused_k), OptionalTensor(call.alibi_slopes));
}

void low_level_forward_v2(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppForwardV2>(
      "_ZN2at4cuda24_flash_attention_forwardERKNS_6TensorES3_S3_RKSt8optionalIS1_ES7_lldbbS4_IdES4_"
      "IlES9_S7_S7_S7_S9_");
  run(stack, call.op, sdpa_stage(), forward_v2(), cpp, call.query.get(), call.key.get(),
      call.value.get(), OptionalTensor(call.cum_seq_q), OptionalTensor(call.cum_seq_k), call.max_q,
      call.max_k, call.dropout_p, call.is_causal, call.return_debug_mask, call.scale,
      call.window_size_left, call.window_size_right, OptionalTensor(call.seqused_k),
      OptionalTensor(call.alibi_slopes), OptionalTensor(call.block_table), call.num_splits);
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

void low_level_backward(const BackwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppBackward>(
      "_ZN2at4cuda25_flash_attention_backwardERKNS_6TensorES3_S3_S3_S3_S3_S3_S3_lldbS3_S3_"
      "St8optionalIdES4_IlES6_");
  run(stack, call.op, sdpa_stage(), &aoti_torch_cuda__flash_attention_backward, cpp,
      call.grad_out.get(), call.query.get(), call.key.get(), call.value.get(), call.out.get(),
      call.logsumexp.get(), call.cum_seq_q.get(), call.cum_seq_k.get(), call.max_q, call.max_k,
      call.dropout_p, call.is_causal, call.rng_state.get(), call.unused.get(), call.scale,
      call.window_size_left, call.window_size_right);
}

}  // namespace

void flash_forward(const ForwardCall& call, StableIValue* stack) {
  if (!call.is_low_level) return sdpa_forward(call, stack);
  call.has_block_table ? low_level_forward_v2(call, stack) : low_level_forward_v1(call, stack);
}

void flash_forward_inplace(const ForwardCall& call, StableIValue* stack) {
  static const auto cpp = cpp_function<CppForwardInplaceV2>(
      "_ZN2at4cuda43_flash_attention_forward_no_dropout_inplaceERNS_6TensorERKS1_S4_S4_"
      "RKSt8optionalIS1_ES8_lldbbS5_IdES5_IlESA_S8_"
      "S8_S8_SA_");
  run(stack, call.op, sdpa_stage(), forward_inplace_v2(), cpp, call.out.get(), call.query.get(),
      call.key.get(), call.value.get(), OptionalTensor(call.cum_seq_q),
      OptionalTensor(call.cum_seq_k), call.max_q, call.max_k, call.dropout_p, call.is_causal,
      call.return_debug_mask, call.scale, call.window_size_left, call.window_size_right,
      OptionalTensor(call.seqused_k), OptionalTensor(call.alibi_slopes),
      OptionalTensor(call.block_table), call.num_splits);
}

void flash_backward(const BackwardCall& call, StableIValue* stack) {
  call.is_low_level ? low_level_backward(call, stack) : sdpa_backward(call, stack);
}

}  // namespace fa4::aten
