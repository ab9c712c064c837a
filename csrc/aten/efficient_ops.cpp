// The op through which PyTorch calls memory-efficient attention. It takes there what neither flash
// attention nor cuDNN runs: calls with a mask where algorithms must be deterministic or cuDNN is
// switched off, some head dims, and all of fp32. No speed rule leaves a call to it.
#include <limits>

#include "backward.h"
#include "bias.h"
#include "context.h"
#include "decide.h"
#include "forward.h"
#include "ops.h"
#include "options.h"
#include "our_seed.h"
#include "stock.h"

namespace fa4::aten {
namespace {

// They may not run what came here where the user has chosen memory-efficient attention.
bool may_be_ours() {
  return options().prefer.load(std::memory_order_relaxed) && flash_enabled() &&
         !efficient_put_first();
}

// Returns no plan where our kernels may not run the call.
PlannedForward plan_ours(const ForwardCall& call) {
  if (!may_be_ours()) return {};
  if (info(call.query.get()).dtype == aoti_torch_dtype_float32()) return {};
  PlannedForward planned{describe(call), {}};
  planned.plan = decide(call.op, planned.d, true);
  return planned;
}

// PyTorch's backward may follow, which computes the gradient of attn_bias. Where a row has no keys,
// and behind the last row, it takes a logsumexp of +inf for one whose probabilities are 0.
void finish_for_pytorch(const Handle& logsumexp, const Problem& p) {
  constexpr double kNoKeys = std::numeric_limits<double>::infinity();
  if (p.bias) replace_negative_infinity(logsumexp.get(), kNoKeys);
  if (const int64_t padding = lse_rows(p) - p.seqlen_q)
    fill(narrow(logsumexp.get(), 2, p.seqlen_q, padding).get(), kNoKeys);
}

// The logsumexp of a call that asks for none.
Handle no_logsumexp(const TensorInfo& query) {
  const int64_t size[] = {query.size[0], query.size[1], 0};
  return empty(3, size, aoti_torch_dtype_float32(), query.device_index);
}

}  // namespace

void scaled_dot_product_efficient_attention(StableIValue* stack, uint64_t num_inputs,
                                            uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kEfficientForward);
  const ForwardCall call = take_efficient_forward(arguments);
  const PlannedForward planned = plan_ours(call);
  if (!planned) return stock_forward(call, stack);
  auto [out, logsumexp, philox_offset] = forward(call, planned, aoti_torch_dtype_int64());
  if (call.compute_log_sumexp) {
    finish_for_pytorch(logsumexp, planned.d.problem);
  } else {
    logsumexp = no_logsumexp(planned.d.query);
  }
  // The kernel is running already. Nothing may throw once the first result is on the stack.
  Handle philox_seed = our_seed(planned.d.query.device_index);
  stack[0] = give(std::move(out));
  stack[1] = give(std::move(logsumexp));
  stack[2] = give(std::move(philox_seed));
  stack[3] = give(std::move(philox_offset));
}

void scaled_dot_product_efficient_attention_backward(StableIValue* stack, uint64_t num_inputs,
                                                     uint64_t num_outputs) {
  Arguments arguments(stack, num_inputs, num_outputs, kEfficientBackward);
  const BackwardCall call = take_efficient_backward(arguments);
  if (!is_our_seed(call.rng_state.get())) return stock_backward(call, stack);
  BackwardDescription d = describe(call);
  d.problem.deterministic = deterministic_algorithms();
  if (!d.reason && call.wanted.back()) d.reason = kNoGradientOfBias;
  const Plan plan = decide(call.op, d, true);
  if (!plan.supported()) return stock_backward(call, stack);
  warn_of_nondeterminism();
  Gradients gradients = compute_gradients(call, d, plan);
  Handle no_gradient_of_bias = undefined();
  stack[0] = give(std::move(gradients.query));
  stack[1] = give(std::move(gradients.key));
  stack[2] = give(std::move(gradients.value));
  stack[3] = give(std::move(no_gradient_of_bias));
}

}  // namespace fa4::aten
