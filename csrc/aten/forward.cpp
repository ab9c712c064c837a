#include "../core/launch.h"
#include "decide.h"
#include "describe.h"
#include "ops.h"
#include "stock.h"
#include "stream.h"

namespace fa4::aten {
namespace {

ForwardCall sdpa_call(StableIValue* stack) {
  Arguments arguments(stack);
  ForwardCall call;
  call.op = "_scaled_dot_product_flash_attention";
  call.order = DimOrder::kHeadsFirst;
  call.query = arguments.tensor();
  call.key = arguments.tensor();
  call.value = arguments.tensor();
  call.dropout_p = arguments.value<double>();
  call.is_causal = arguments.value<bool>();
  call.return_debug_mask = arguments.value<bool>();
  call.scale = arguments.value<std::optional<double>>();
  return call;
}

ForwardCall flash_call(StableIValue* stack, uint64_t num_inputs) {
  constexpr uint64_t kWithBlockTable = 17;  // torch 2.12 and later
  Arguments arguments(stack);
  ForwardCall call;
  call.op = "_flash_attention_forward";
  call.order = DimOrder::kSequenceFirst;
  call.query = arguments.tensor();
  call.key = arguments.tensor();
  call.value = arguments.tensor();
  call.cum_seq_q = arguments.optional_tensor();
  call.cum_seq_k = arguments.optional_tensor();
  call.max_q = arguments.value<int64_t>();
  call.max_k = arguments.value<int64_t>();
  call.dropout_p = arguments.value<double>();
  call.is_causal = arguments.value<bool>();
  call.return_debug_mask = arguments.value<bool>();
  call.scale = arguments.value<std::optional<double>>();
  call.window_size_left = arguments.value<std::optional<int64_t>>();
  call.window_size_right = arguments.value<std::optional<int64_t>>();
  call.seqused_k = arguments.optional_tensor();
  call.alibi_slopes = arguments.optional_tensor();
  call.has_block_table = num_inputs >= kWithBlockTable;
  if (call.has_block_table) {
    call.block_table = arguments.optional_tensor();
    call.num_splits = arguments.value<std::optional<int64_t>>();
  }
  return call;
}

struct Outputs {
  Handle out, logsumexp;
};

Outputs run(const ForwardCall& call, const ForwardDescription& d, const Plan& plan) {
  const Problem& p = d.problem;
  const bool varlen = p.layout == Layout::kVarlen;
  const int64_t lse_size[] = {varlen ? p.num_heads : p.batch, varlen ? p.total_q : p.num_heads, p.seqlen_q};
  const int32_t device = d.query.device_index;
  Outputs outputs{empty_like(d.query), empty(varlen ? 2 : 3, lse_size, aoti_torch_dtype_float32(), device)};
  const Readable query(call.query.get(), d.query, call.order), key(call.key.get(), d.key, call.order),
      value(call.value.get(), d.value, call.order);
  ForwardArguments arguments;
  arguments.q = query.view;
  arguments.k = key.view;
  arguments.v = value.view;
  arguments.o = view(outputs.out.get(), info(outputs.out.get()), call.order);
  arguments.lse = static_cast<float*>(data(outputs.logsumexp.get()));
  if (varlen) {
    arguments.cu_seqlens_q = static_cast<const int32_t*>(data(call.cum_seq_q.get()));
    arguments.cu_seqlens_k = static_cast<const int32_t*>(data(call.cum_seq_k.get()));
  }
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
  const ForwardCall call = sdpa_call(stack);
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
  const ForwardCall call = flash_call(stack, num_inputs);
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
