#include <limits>

#include "../core/launch/launch.h"
#include "decide.h"
#include "describe.h"
#include "ops.h"
#include "profile_range.h"
#include "stock.h"
#include "torch_errors.h"

namespace fa4::aten {
namespace {

Handle empty_logsumexp(const ForwardDescription& d) {
  const LogsumexpShape shape = logsumexp_shape(d.problem);
  return empty(shape.dim, shape.size, aoti_torch_dtype_float32(), d.query.device_index);
}

// Holds the plan's workspace, in `memory` where that is large enough.
struct Scratch {
  Handle own;
  void* data = nullptr;

  Scratch(const Plan& plan, int32_t device, const Handle& memory, int64_t memory_bytes) {
    const int64_t bytes = plan.workspace.bytes;
    if (bytes == 0) return;
    if (bytes > memory_bytes) own = empty(1, &bytes, aoti_torch_dtype_uint8(), device);
    data = aten::data(own ? own.get() : memory.get());
  }
};

// Computes attention into `out` and `logsumexp`. `out` is a view of `out_tensor`.
void run(const ForwardCall& call, const ForwardDescription& d, const Plan& plan,
         AtenTensorHandle out_tensor, const TensorView& out, const Handle& logsumexp,
         const Scratch& scratch) {
  if (plan.nothing_to_compute) {
    fill(out_tensor, 0);
    return fill(logsumexp.get(), -std::numeric_limits<double>::infinity());
  }
  const Problem& p = d.problem;
  const Readable query(call.query.get(), d.query, call.order),
      key(call.key.get(), d.key, call.order), value(call.value.get(), d.value, call.order);
  ForwardArguments arguments;
  arguments.q = query.view;
  arguments.k = key.view;
  arguments.v = value.view;
  arguments.o = out;
  arguments.lse = static_cast<float*>(data(logsumexp.get()));
  arguments.workspace = scratch.data;
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
  launching([&] { launch_forward(p, plan, arguments, d.target); });
}

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
  const Scratch scratch(plan, device, outputs.unused, sizeof(uint64_t));
  run(call, d, plan, outputs.out.get(), view(outputs.out.get(), out, call.order), outputs.logsumexp,
      scratch);
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
  Handle logsumexp = empty_logsumexp(d);
  Writable out(call.out.get(), call.order);
  run(call, d, plan, out.tensor, out.view, logsumexp,
      Scratch(plan, d.query.device_index, Handle(), 0));
  out.finish();
  stack[0] = give(std::move(logsumexp));
}

}  // namespace fa4::aten
