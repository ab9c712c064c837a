// The ops through which PyTorch calls cuDNN's attention. It prefers them on Hopper and Blackwell.
#include <cstdlib>
#include <cstring>

#include "backward.h"
#include "context.h"
#include "forward.h"
#include "ops.h"
#include "options.h"
#include "our_seed.h"
#include "stock.h"
#include "torch_version.h"

namespace fa4::aten {
namespace {

// With this variable torch gives cuDNN a logsumexp in another order of dimensions than ours, and
// reads it as such in the backward.
bool torch_reorders_logsumexp() {
  static const bool reorders = [] {
    const char* value = std::getenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE");
    return value && std::strcmp(value, "1") == 0;
  }();
  return reorders;
}

// Returns whether our kernels may run what came to a cuDNN op. They may not where the user has
// chosen cuDNN.
bool may_be_ours() {
  return options().prefer.load(std::memory_order_relaxed) && flash_enabled() &&
         !cudnn_put_first() && !torch_reorders_logsumexp();
}

// Returns no plan where our kernels may not run the call.
PlannedForward plan_ours(const ForwardCall& call) {
  if (stock_is_running() || !may_be_ours()) return {};
  return plan_forward(call);
}

void run(const ForwardCall& call, const PlannedForward& planned, StableIValue* stack) {
  auto [out, logsumexp, philox_offset] = forward(call, planned, aoti_torch_dtype_int64());
  // The kernel is running already. Nothing may throw once the first result is on the stack.
  Handle philox_seed = our_seed(planned.d.query.device_index), no_cum_seq_q = undefined(),
         no_cum_seq_k = undefined(), no_debug_mask = undefined();
  stack[0] = give(std::move(out));
  stack[1] = give(std::move(logsumexp));
  // The caller has cum_seq_q and cum_seq_k, or there are none.
  stack[2] = give(std::move(no_cum_seq_q));
  stack[3] = give(std::move(no_cum_seq_k));
  stack[6] = give(std::move(philox_seed));
  stack[7] = give(std::move(philox_offset));
  stack[8] = give(std::move(no_debug_mask));
}

void run_forward(const ForwardCall& call, StableIValue* stack) {
  const PlannedForward planned = plan_ours(call);
  if (!planned) return stock_forward(call, stack);
  run(call, planned, stack);
  const bool dense = planned.d.problem.layout == Layout::kDense;
  stack[4] = torch::stable::detail::from(dense ? planned.d.query.size[2] : call.max_q);
  stack[5] = torch::stable::detail::from(dense ? planned.d.key.size[2] : call.max_k);
}

// Before this version the logsumexp of packed calls had another shape.
bool packed_calls_may_be_ours() { return torch_is_at_least(2, 14); }

// torch.nn.attention.varlen does not hand the seed to the backward.
bool is_ours(const BackwardCall& call) {
  if (call.order == DimOrder::kHeadsFirst) return is_our_seed(call.rng_state.get());
  return packed_calls_may_be_ours() && may_be_ours();
}

void run_backward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs,
                  const KnownOp& op) {
  Arguments arguments(stack, num_inputs, num_outputs, op);
  const BackwardCall call = take_cudnn_backward(arguments, op);
  is_ours(call) ? backward(call, stack) : stock_backward(call, stack);
}

}  // namespace

void scaled_dot_product_cudnn_attention(StableIValue* stack, uint64_t num_inputs,
                                        uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kCudnnSdpaForward);
  run_forward(take_cudnn_sdpa_forward(arguments), stack);
}

void scaled_dot_product_cudnn_attention_backward(StableIValue* stack, uint64_t num_inputs,
                                                 uint64_t num_outputs) {
  run_backward(stack, num_inputs, num_outputs, kCudnnSdpaBackward);
}

void cudnn_attention_forward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kCudnnForward);
  const ForwardCall call = take_cudnn_forward(arguments, num_inputs == kCudnnForward.inputs[1]);
  const bool left_to_cudnn = call.cum_seq_q && !packed_calls_may_be_ours();
  left_to_cudnn ? stock_forward(call, stack) : run_forward(call, stack);
}

void cudnn_attention_forward_no_dropout_inplace(StableIValue* stack, uint64_t num_inputs,
                                                uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kCudnnForwardInplace);
  const ForwardCall call = take_cudnn_forward_inplace(arguments);
  if (!defined(call.cum_seq_q.get())) return stock_forward_inplace(call, stack);
  const PlannedForward planned = plan_ours(call);
  if (!planned) return stock_forward_inplace(call, stack);
  stack[0] = give(forward_inplace(call, planned));
}

void cudnn_attention_backward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  run_backward(stack, num_inputs, num_outputs, kCudnnBackward);
}

}  // namespace fa4::aten
