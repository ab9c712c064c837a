#include "backward.h"
#include "decide.h"
#include "forward.h"
#include "ops.h"
#include "stock.h"

namespace fa4::aten {
namespace {

// Each output has memory of its own, as the schema promises: code that wraps the op, saves its
// results or frees them one by one relies on that.
struct Outputs {
  Handle out, logsumexp;
  // These are never read without dropout, and the stock kernel leaves them uninitialised too.
  // Filling them would cost two launches.
  Handle rng_state, unused, debug_mask;
};

Outputs run(const ForwardCall& call, const ForwardDescription& d, const Plan& plan) {
  constexpr int64_t kTwo = 2, kZero = 0;
  const int32_t number = aoti_torch_dtype_uint64(), device = d.query.device_index;
  const OutputShape shape(d.query, d.value);
  const TensorInfo out = shape.info(d.query);
  Outputs outputs{empty(out), empty_logsumexp(d), Handle(), empty(0, nullptr, number, device),
                  Handle()};
  // The workspace of packed calls is one counter of tiles, which fits into this number. Nobody
  // reads the number.
  const WorkspaceMemory workspace(plan, device, outputs.unused, sizeof(uint64_t));
  forward(call, d, plan, outputs.out.get(), view(outputs.out.get(), out, call.order),
          outputs.logsumexp, workspace);
  // The kernel is running already while these are allocated.
  outputs.rng_state = empty(1, &kTwo, number, device);
  outputs.debug_mask = empty(1, &kZero, d.query.dtype, device);
  return outputs;
}

}  // namespace

void scaled_dot_product_flash_attention(StableIValue* stack, uint64_t num_inputs,
                                        uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kSdpaForward);
  const ForwardCall call = take_sdpa_forward(arguments);
  const ForwardDescription d = describe(call);
  const Plan plan = decide(call.op, d);
  if (!plan.supported()) return stock_forward(call, stack);
  Outputs outputs = run(call, d, plan);
  stack[0] = give(std::move(outputs.out));
  stack[1] = give(std::move(outputs.logsumexp));
  // Dense inputs have no cum_seq_q and no cum_seq_k.
  stack[2] = give(undefined());
  stack[3] = give(undefined());
  stack[4] = torch::stable::detail::from(d.problem.seqlen_q);
  stack[5] = torch::stable::detail::from(d.problem.seqlen_k);
  stack[6] = give(std::move(outputs.rng_state));
  stack[7] = give(std::move(outputs.unused));
  stack[8] = give(std::move(outputs.debug_mask));
}

void flash_attention_forward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kFlashForward);
  const ForwardCall call = take_flash_forward(arguments, num_inputs == kFlashForward.inputs[1]);
  if (stock_is_running()) return stock_forward(call, stack);
  const ForwardDescription d = describe(call);
  const Plan plan = decide(call.op, d);
  if (!plan.supported()) return stock_forward(call, stack);
  Outputs outputs = run(call, d, plan);
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
  const ForwardDescription d = describe(call);
  const Plan plan = decide(call.op, d);
  if (!plan.supported()) return stock_forward_inplace(call, stack);
  stack[0] = give(forward_inplace(call, d, plan));
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
