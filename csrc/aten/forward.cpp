#include "../core/integers.h"
#include "../core/launch.h"
#include "decide.h"
#include "describe.h"
#include "ops.h"
#include "profile_range.h"
#include "stock.h"
#include "stream.h"

namespace fa4::aten {
namespace {

// Attention into `out` and `logsumexp`.
void run(const ForwardCall& call, const ForwardDescription& d, const Plan& plan, const TensorView& out, const Handle& logsumexp) {
  const Problem& p = d.problem;
  const int32_t device = d.query.device_index;
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
}

struct Outputs {
  Handle out, logsumexp;
  // Never read without dropout, and uninitialised in the stock kernel's results too: filling them would cost two launches.
  Handle rng_state, unused, debug_mask;
};

// Two allocations, of which all outputs but the first are parts: each allocation takes 0.7 us of a forward's 11.
Outputs run(const ForwardCall& call, const ForwardDescription& d, const Plan& plan) {
  constexpr int64_t kTwo = 2, kZero = 0, kNumber = sizeof(uint64_t);
  const LogsumexpShape shape = logsumexp_shape(d.problem);
  const int64_t numbers = round_up(shape.elements() * static_cast<int64_t>(sizeof(float)), kNumber);  // where they begin
  const int64_t bytes = numbers + 3 * kNumber;
  const int32_t number = aoti_torch_dtype_uint64();
  Handle out = empty_output(d.query, d.value);
  const Handle others = empty(1, &bytes, aoti_torch_dtype_uint8(), d.query.device_index);
  Handle logsumexp = part(others, 0, aoti_torch_dtype_float32(), shape.dim, shape.size);
  run(call, d, plan, view(out.get(), info(out.get()), call.order), logsumexp);
  Handle debug_mask = part(out, 0, d.query.dtype, 1, &kZero);
  return {std::move(out), std::move(logsumexp), part(others, numbers, number, 1, &kTwo),
          part(others, numbers + 2 * kNumber, number, 0, nullptr), std::move(debug_mask)};
}

}  // namespace

void scaled_dot_product_flash_attention(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ForwardCall call = take_sdpa_forward(arguments);
  const ForwardDescription d = describe(call);
  const Plan plan = decide(call.op, d.problem, d.reason);
  if (!plan.supported()) return stock_forward(call, stack);
  Outputs outputs = run(call, d, plan);
  stack[0] = give(std::move(outputs.out));
  stack[1] = give(std::move(outputs.logsumexp));
  stack[2] = give(undefined());  // cum_seq_q and cum_seq_k of dense inputs
  stack[3] = give(undefined());
  stack[4] = torch::stable::detail::from(d.problem.seqlen_q);
  stack[5] = torch::stable::detail::from(d.problem.seqlen_k);
  stack[6] = give(std::move(outputs.rng_state));
  stack[7] = give(std::move(outputs.unused));
  stack[8] = give(std::move(outputs.debug_mask));
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
  stack[0] = give(std::move(outputs.out));
  stack[1] = give(std::move(outputs.logsumexp));
  stack[2] = give(std::move(outputs.rng_state));
  stack[3] = give(std::move(outputs.unused));
  stack[4] = give(std::move(outputs.debug_mask));
}

void flash_attention_forward_no_dropout_inplace(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ForwardCall call = take_flash_forward_inplace(arguments);
  const ForwardDescription d = describe(call);
  const Plan plan = decide(call.op, d.problem, d.reason);
  if (!plan.supported()) return stock_forward_inplace(call, stack);
  const LogsumexpShape shape = logsumexp_shape(d.problem);
  Handle logsumexp = empty(shape.dim, shape.size, aoti_torch_dtype_float32(), d.query.device_index);
  Writable out(call.out.get(), call.order);
  run(call, d, plan, out.view, logsumexp);
  out.finish();
  stack[0] = give(std::move(logsumexp));
}

}  // namespace fa4::aten
