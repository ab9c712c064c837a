#include "backward.h"
#include "forward.h"
#include "ops.h"
#include "stock.h"

namespace fa4::aten {
namespace {

struct Outputs {
  Handle out, logsumexp;
  // These are never read without dropout, and the stock kernel leaves them uninitialised too.
  // Filling them would cost two launches.
  Handle rng_state, unused, debug_mask;
};

Outputs run(const ForwardCall& call, const PlannedForward& planned) {
  constexpr int64_t kTwo = 2, kZero = 0;
  const int32_t number = aoti_torch_dtype_uint64(), device = planned.d.query.device_index;
  auto [out, logsumexp, unused] = forward(call, planned, number);
  // The kernel is running already while the rest is allocated.
  return {std::move(out), std::move(logsumexp), empty(1, &kTwo, number, device), std::move(unused),
          empty(1, &kZero, planned.d.query.dtype, device)};
}

}  // namespace

void scaled_dot_product_flash_attention(StableIValue* stack, uint64_t num_inputs,
                                        uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kSdpaForward);
  const ForwardCall call = take_sdpa_forward(arguments);
  const PlannedForward planned = plan_forward(call);
  if (!planned) return stock_forward(call, stack);
  Outputs outputs = run(call, planned);
  // Dense inputs have neither. Nothing may throw once the first result is on the stack.
  Handle no_cum_seq_q = undefined(), no_cum_seq_k = undefined();
  stack[0] = give(std::move(outputs.out));
  stack[1] = give(std::move(outputs.logsumexp));
  stack[2] = give(std::move(no_cum_seq_q));
  stack[3] = give(std::move(no_cum_seq_k));
  stack[4] = torch::stable::detail::from(planned.d.problem.seqlen_q);
  stack[5] = torch::stable::detail::from(planned.d.problem.seqlen_k);
  stack[6] = give(std::move(outputs.rng_state));
  stack[7] = give(std::move(outputs.unused));
  stack[8] = give(std::move(outputs.debug_mask));
}

void flash_attention_forward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kFlashForward);
  const ForwardCall call = take_flash_forward(arguments, num_inputs == kFlashForward.inputs[1]);
  if (stock_is_running()) return stock_forward(call, stack);
  const PlannedForward planned = plan_forward(call);
  if (!planned) return stock_forward(call, stack);
  Outputs outputs = run(call, planned);
  stack[0] = give(std::move(outputs.out));
  stack[1] = give(std::move(outputs.logsumexp));
  stack[2] = give(std::move(outputs.rng_state));
  stack[3] = give(std::move(outputs.unused));
  stack[4] = give(std::move(outputs.debug_mask));
}

void flash_attention_forward_no_dropout_inplace(StableIValue* stack, uint64_t num_inputs,
                                                uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kFlashForwardInplace);
  const ForwardCall call = take_flash_forward_inplace(arguments);
  const PlannedForward planned = plan_forward(call);
  if (!planned) return stock_forward_inplace(call, stack);
  stack[0] = give(forward_inplace(call, planned));
}

void scaled_dot_product_flash_attention_backward(StableIValue* stack, uint64_t num_inputs,
                                                 uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kSdpaBackward);
  backward(take_backward(arguments, kSdpaBackward, DimOrder::kHeadsFirst), stack);
}

void flash_attention_backward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kFlashBackward);
  backward(take_backward(arguments, kFlashBackward, DimOrder::kSequenceFirst), stack);
}

}  // namespace fa4::aten
