#include "attention.h"

#include <array>

#include "../core/error.h"
#include "backward.h"
#include "forward.h"
#include "stock.h"
#include "torch_version.h"

namespace fa4::aten {
namespace {

constexpr KnownOp kAttention{"attention", {15, 15}, 2};
constexpr KnownOp kAttentionBackward{"attention_backward", {15, 15}, 3};

template <class Call>
void take_qkv(Arguments& arguments, Call& call) {
  call.query = arguments.tensor();
  call.key = arguments.tensor();
  call.value = arguments.tensor();
}

template <class Call>
void take_lengths(Arguments& arguments, Call& call) {
  call.cum_seq_q = arguments.optional_tensor();
  call.cum_seq_k = arguments.optional_tensor();
  call.max_q = arguments.value<int64_t>();
  call.max_k = arguments.value<int64_t>();
}

template <class Call>
void take_scale_and_mask(Arguments& arguments, Call& call) {
  call.scale = arguments.value<std::optional<double>>();
  call.is_causal = arguments.value<bool>();
  call.window_size_left = arguments.value<int64_t>();
  call.window_size_right = arguments.value<int64_t>();
}

ForwardCall take_attention(Arguments& arguments) {
  ForwardCall call;
  call.op = kAttention.name;
  call.is_own = true;
  call.is_low_level = true;
  call.order = DimOrder::kSequenceFirst;
  take_qkv(arguments, call);
  take_lengths(arguments, call);
  call.seqused_k = arguments.optional_tensor();
  call.block_table = arguments.optional_tensor();
  take_scale_and_mask(arguments, call);
  call.num_splits = arguments.value<int64_t>();
  call.has_block_table = torch_is_at_least(2, 12);
  return call;
}

// The stock ops take an undefined tensor where dense tensors have no offsets.
Handle or_undefined(Handle tensor) { return tensor ? std::move(tensor) : undefined(); }

BackwardCall take_attention_backward(Arguments& arguments) {
  BackwardCall call;
  call.op = kAttentionBackward.name;
  call.is_low_level = true;
  call.order = DimOrder::kSequenceFirst;
  call.grad_out = arguments.tensor();
  take_qkv(arguments, call);
  call.out = arguments.tensor();
  call.logsumexp = arguments.tensor();
  take_lengths(arguments, call);
  call.cum_seq_q = or_undefined(std::move(call.cum_seq_q));
  call.cum_seq_k = or_undefined(std::move(call.cum_seq_k));
  take_scale_and_mask(arguments, call);
  call.deterministic = arguments.value<bool>();
  return call;
}

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
  ForwardCall call = take_attention(arguments);
  // Only the backward looks at it, and autograd hands it on from here.
  static_cast<void>(arguments.value<bool>());
  Results results = run(call);
  stack[0] = give(std::move(results.out));
  stack[1] = give(std::move(results.logsumexp));
}

void attention_backward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kAttentionBackward);
  BackwardCall call = take_attention_backward(arguments);
  // Without dropout nobody reads these two.
  call.rng_state = undefined();
  call.unused = undefined();
  backward(call, stack);
}

}  // namespace fa4::aten
