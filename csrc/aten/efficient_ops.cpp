// The op through which PyTorch calls memory-efficient attention. It takes there what neither flash
// attention nor cuDNN runs: calls with a mask where algorithms must be deterministic or cuDNN is
// switched off, some head dims, and all of fp32. No speed rule leaves a call to it.
#include "../core/error.h"
#include "backward.h"
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

// Returns why our kernels would not run the backward of this forward. They compute no gradient of
// attn_bias, and a compiled program, which runs forwards with gradients switched off, does not tell
// whether it will ask for one.
std::optional<std::string> why_not_backward(const ForwardCall& call,
                                            const ForwardDescription& forward) {
  if (!call.compute_log_sumexp) return std::nullopt;
  if (call.attn_bias && !aoti_torch_grad_mode_is_enabled())
    return "a compiled program may ask for the gradient of attn_bias";
  Description backward = forward;
  backward.problem.op = Op::kBackward;
  backward.problem.deterministic = deterministic_algorithms();
  return choose(backward, false).reason;
}

// Returns no plan where our kernels may not run the call, or would run half of it.
PlannedForward plan_ours(const ForwardCall& call) {
  if (!may_be_ours()) return {};
  if (info(call.query.get()).dtype == aoti_torch_dtype_float32()) return {};
  PlannedForward planned{describe(call), {}};
  if (!planned.d.reason) planned.d.reason = why_not_backward(call, planned.d);
  planned.plan = decide(call.op, planned.d, true);
  return planned;
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
  if (!call.compute_log_sumexp) logsumexp = no_logsumexp(planned.d.query);
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
  const Plan plan = choose(d, false);
  // PyTorch's kernel would read our logsumexp otherwise in rows without keys.
  if (!plan.supported()) fail("FA4 ", call.op, " unsupported: ", *plan.reason);
  if (call.wanted.back())
    fail("FA4 ", call.op, " unsupported: attn_bias required no gradient when the forward ran");
  warn_of_nondeterminism();
  Gradients gradients = compute_gradients(call, d, plan);
  Handle no_gradient_of_bias = undefined();
  stack[0] = give(std::move(gradients.query));
  stack[1] = give(std::move(gradients.key));
  stack[2] = give(std::move(gradients.value));
  stack[3] = give(std::move(no_gradient_of_bias));
}

}  // namespace fa4::aten
