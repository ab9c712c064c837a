#include "../core/launch.h"
#include "decide.h"
#include "describe.h"
#include "ops.h"
#include "profile_range.h"
#include "stock.h"
#include "stream.h"

namespace fa4::aten {
namespace {

// Attention into `out`; returns logsumexp.
Handle run(const ForwardCall& call, const ForwardDescription& d, const Plan& plan, const TensorView& out) {
  const Problem& p = d.problem;
  const LogsumexpShape shape = logsumexp_shape(p);
  const int32_t device = d.query.device_index;
  Handle logsumexp = empty(shape.dim, shape.size, aoti_torch_dtype_float32(), device);
  const Readable query(call.query.get(), d.query, call.order), key(call.key.get(), d.key, call.order),
      value(call.value.get(), d.value, call.order);
  ForwardArguments arguments;
  arguments.q = query.view;
  arguments.k = key.view;
  arguments.v = value.view;
  arguments.o = out;
  arguments.lse = static_cast<float*>(data(logsumexp.get()));
  arguments.cu_seqlens_q = cu_seqlens(p, call.cum_seq_q);
  arguments.cu_seqlens_k = cu_seqlens(p, call.cum_seq_k);
  if (call.seqused_k) arguments.seqused_k = static_cast<const int32_t*>(data(call.seqused_k.get()));
  if (call.block_table) {
    const TensorInfo block_table = info(call.block_table.get());
    arguments.block_table = static_cast<const int32_t*>(data(call.block_table.get()));
    arguments.block_table_columns = block_table.size[1];
    arguments.block_table_stride = block_table.stride[0];
  }
  arguments.softmax_scale = softmax_scale(call.scale, p.head_dim);
  const ProfileRange range(plan.kernel->name);
  launch_forward(p, plan, arguments, {device, current_stream(device)});
  return logsumexp;
}

struct Outputs {
  Handle out, logsumexp;
};

Outputs run(const ForwardCall& call, const ForwardDescription& d, const Plan& plan) {
  Handle out = empty_output(d.query, d.value);
  Handle logsumexp = run(call, d, plan, view(out.get(), info(out.get()), call.order));
  return {std::move(out), std::move(logsumexp)};
}

// Never read without dropout, and uninitialised in the stock kernel's results too: filling them would cost two launches. They are
// parts of one allocation, and of the output's: each allocation takes 0.7 us of a forward's 11.
struct RngOutputs {
  Handle rng_state, unused, debug_mask;

  RngOutputs(const TensorInfo& query, const Handle& out) {
    const int64_t three = 3, two = 2, zero = 0, one = 1;
    const Handle numbers = empty(1, &three, aoti_torch_dtype_uint64(), query.device_index);
    rng_state = part(numbers, 1, &two, &one, 0);
    unused = part(numbers, 0, nullptr, nullptr, 2);
    debug_mask = part(out, 1, &zero, &one, 0);
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
  RngOutputs rng(d.query, outputs.out);
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
  RngOutputs rng(d.query, outputs.out);
  stack[0] = give(std::move(outputs.out));
  stack[1] = give(std::move(outputs.logsumexp));
  stack[2] = give(std::move(rng.rng_state));
  stack[3] = give(std::move(rng.unused));
  stack[4] = give(std::move(rng.debug_mask));
}

void flash_attention_forward_no_dropout_inplace(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ForwardCall call = take_flash_forward_inplace(arguments);
  const ForwardDescription d = describe(call);
  const Plan plan = decide(call.op, d.problem, d.reason);
  if (!plan.supported()) return stock_forward_inplace(call, stack);
  Writable out(call.out.get(), call.order);
  Handle logsumexp = run(call, d, plan, out.view);
  out.finish();
  stack[0] = give(std::move(logsumexp));
}

}  // namespace fa4::aten
