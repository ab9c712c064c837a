#include "../core/launch.h"
#include "decide.h"
#include "describe.h"
#include "ops.h"
#include "stock.h"
#include "stream.h"

namespace fa4::aten {
namespace {

struct Outputs {
  Handle out, logsumexp;
};

Outputs run(const ForwardCall& call, const ForwardDescription& d, const Plan& plan) {
  const Problem& p = d.problem;
  const LogsumexpShape lse = logsumexp_shape(p);
  const int32_t device = d.query.device_index;
  Outputs outputs{empty_like(d.query), empty(lse.dim, lse.size, aoti_torch_dtype_float32(), device)};
  const Readable query(call.query.get(), d.query, call.order), key(call.key.get(), d.key, call.order),
      value(call.value.get(), d.value, call.order);
  ForwardArguments arguments;
  arguments.q = query.view;
  arguments.k = key.view;
  arguments.v = value.view;
  arguments.o = view(outputs.out.get(), info(outputs.out.get()), call.order);
  arguments.lse = static_cast<float*>(data(outputs.logsumexp.get()));
  arguments.cu_seqlens_q = cu_seqlens(p, call.cum_seq_q);
  arguments.cu_seqlens_k = cu_seqlens(p, call.cum_seq_k);
  arguments.softmax_scale = softmax_scale(call.scale, p.head_dim);
  launch_forward(p, plan, arguments, {device, current_stream(device)});
  return outputs;
}

// Never read without dropout, and uninitialised in the stock kernel's results too: filling them would cost two launches.
struct RngOutputs {
  Handle rng_state, unused, debug_mask;

  explicit RngOutputs(const TensorInfo& query) {
    const int64_t two = 2, zero = 0;
    rng_state = empty(1, &two, aoti_torch_dtype_uint64(), query.device_index);
    unused = empty(0, nullptr, aoti_torch_dtype_uint64(), query.device_index);
    debug_mask = empty(1, &zero, query.dtype, query.device_index);
  }
};

}  // namespace

void scaled_dot_product_flash_attention(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ForwardCall call = take_sdpa_forward(arguments);
  const ForwardDescription d = describe(call);
  const Plan plan = decide(call.op, d.problem, d.reason);
  if (!plan.supported()) return stock_forward(call, stack);
  Outputs outputs = run(call, d, plan);
  RngOutputs rng(d.query);
  stack[0] = give(std::move(outputs.out));
  stack[1] = give(std::move(outputs.logsumexp));
  stack[2] = give(undefined());  // cum_seq_q and cum_seq_k of dense inputs
  stack[3] = give(undefined());
  stack[4] = torch::stable::detail::from(d.problem.seqlen_q);
  stack[5] = torch::stable::detail::from(d.problem.seqlen_k);
  stack[6] = give(std::move(rng.rng_state));
  stack[7] = give(std::move(rng.unused));
  stack[8] = give(std::move(rng.debug_mask));
}

void flash_attention_forward(StableIValue* stack, uint64_t num_inputs, uint64_t) {
  constexpr uint64_t kWithBlockTable = 17;  // torch 2.12 and later
  Arguments arguments(stack);
  const ForwardCall call = take_flash_forward(arguments, num_inputs >= kWithBlockTable);
  if (stock_is_running()) return stock_forward(call, stack);
  const ForwardDescription d = describe(call);
  const Plan plan = decide(call.op, d.problem, d.reason);
  if (!plan.supported()) return stock_forward(call, stack);
  Outputs outputs = run(call, d, plan);
  RngOutputs rng(d.query);
  stack[0] = give(std::move(outputs.out));
  stack[1] = give(std::move(outputs.logsumexp));
  stack[2] = give(std::move(rng.rng_state));
  stack[3] = give(std::move(rng.unused));
  stack[4] = give(std::move(rng.debug_mask));
}

}  // namespace fa4::aten
