#include "attention.h"

#include <array>

#include "../core/error.h"
#include "backward.h"
#include "forward.h"
#include "stock.h"

namespace fa4::aten {
namespace {

// PyTorch's flash attention lacks some of what this op promises. Throws where a call asks for that.
void check_stock_can(const ForwardCall& call, const std::string& reason) {
  const auto refuse = [&](const char* what) {
    fail("FA4 attention unsupported: ", reason,
         "; and PyTorch's flash attention, which would run it, ", what);
  };
  if (call.seqused_k && !call.cum_seq_q) refuse("takes no seqused_k with dense tensors");
  if (!call.has_block_table && (call.block_table || call.num_splits.value_or(0) > 1))
    refuse("takes neither block_table nor num_splits before torch 2.12");
  const bool left_bound_alone =
      !call.is_causal && *call.window_size_left >= 0 && *call.window_size_right < 0;
  if (left_bound_alone && call.max_q > call.max_k + 1)
    refuse("takes max_seqlen_k for the right bound of a window that has a left one alone");
}

struct Results {
  Handle out, logsumexp;
};

Results run_stock(const ForwardCall& call, const std::string& reason) {
  check_stock_can(call, reason);
  std::array<StableIValue, 5> stack;
  stock_forward(call, stack.data());
  std::array<Handle, 5> results;
  for (size_t i = 0; i < stack.size(); ++i)
    results[i] = Handle(torch::stable::detail::to<AtenTensorHandle>(stack[i]));
  return {std::move(results[0]), std::move(results[1])};
}

Results run(const ForwardCall& call) {
  const PlannedForward planned = plan_forward(call);
  if (!planned) return run_stock(call, planned.plan.reason.value_or(""));
  ForwardOutputs outputs = forward(call, planned, aoti_torch_dtype_uint64());
  return {std::move(outputs.out), std::move(outputs.logsumexp)};
}

}  // namespace

void attention(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kAttention);
  Results results = run(take_attention(arguments));
  stack[0] = give(std::move(results.out));
  stack[1] = give(std::move(results.logsumexp));
}

void attention_backward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kAttentionBackward);
  backward(take_attention_backward(arguments), stack);
}

}  // namespace fa4::aten
