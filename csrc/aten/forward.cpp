#include <limits>

#include "../core/integers.h"
#include "../core/launch.h"
#include "decide.h"
#include "describe.h"
#include "ops.h"
#include "profile_range.h"
#include "stock.h"

namespace fa4::aten {
namespace {

// One allocation, which takes 0.7 us of a forward's 11, for all that is not the output: logsumexp, `numbers` of 8 bytes, and the
// workspace.
struct Allocation {
  Handle whole, logsumexp;
  int64_t numbers, workspace;  // where they begin, in bytes

  Allocation(const ForwardDescription& d, const Plan& plan, int64_t count_of_numbers) {
    const LogsumexpShape shape = logsumexp_shape(d.problem);
    numbers = round_up(shape.elements() * static_cast<int64_t>(sizeof(float)), kNumber);
    workspace = numbers + count_of_numbers * kNumber;
    const int64_t bytes = workspace + plan.workspace.bytes;
    whole = empty(1, &bytes, aoti_torch_dtype_uint8(), d.query.device_index);
    logsumexp = part(whole, 0, aoti_torch_dtype_float32(), shape.dim, shape.size);
  }

  static constexpr int64_t kNumber = sizeof(uint64_t);
};

// Attention into `out` and `allocation`. `out_tensor`: what `out` is a view of.
void run(const ForwardCall& call, const ForwardDescription& d, const Plan& plan, AtenTensorHandle out_tensor, const TensorView& out,
         const Allocation& allocation) {
  if (plan.nothing_to_compute) {
    fill(out_tensor, 0);
    return fill(allocation.logsumexp.get(), -std::numeric_limits<double>::infinity());
  }
  const Problem& p = d.problem;
  const Readable query(call.query.get(), d.query, call.order), key(call.key.get(), d.key, call.order),
      value(call.value.get(), d.value, call.order);
  ForwardArguments arguments;
  arguments.q = query.view;
  arguments.k = key.view;
  arguments.v = value.view;
  arguments.o = out;
  arguments.lse = static_cast<float*>(data(allocation.logsumexp.get()));
  arguments.workspace = reinterpret_cast<char*>(arguments.lse) + allocation.workspace;
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
  launch_forward(p, plan, arguments, d.target);
}

struct Outputs {
  Handle out, logsumexp;
  // Never read without dropout, and uninitialised in the stock kernel's results too: filling them would cost two launches.
  Handle rng_state, unused, debug_mask;
};

Outputs run(const ForwardCall& call, const ForwardDescription& d, const Plan& plan) {
  constexpr int64_t kTwo = 2, kZero = 0;
  const int32_t number = aoti_torch_dtype_uint64();
  Handle out = empty_output(d.query, d.value);
  Allocation a(d, plan, kTwo + 1);
  run(call, d, plan, out.get(), view(out.get(), info(out.get()), call.order), a);
  Handle debug_mask = part(out, 0, d.query.dtype, 1, &kZero);
  Handle rng_state = part(a.whole, a.numbers, number, 1, &kTwo);
  Handle unused = part(a.whole, a.numbers + kTwo * Allocation::kNumber, number, 0, nullptr);
  return {std::move(out), std::move(a.logsumexp), std::move(rng_state), std::move(unused), std::move(debug_mask)};
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
  Allocation allocation(d, plan, 0);
  Writable out(call.out.get(), call.order);
  run(call, d, plan, out.tensor, out.view, allocation);
  out.finish();
  stack[0] = give(std::move(allocation.logsumexp));
}

}  // namespace fa4::aten
