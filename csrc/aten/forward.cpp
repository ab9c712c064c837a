#include "forward.h"

#include <limits>

#include "../core/launch/launch.h"
#include "bias.h"
#include "profile_range.h"
#include "torch_errors.h"

namespace fa4::aten {
namespace {

Handle empty_logsumexp(const ForwardDescription& d) {
  const LogsumexpShape shape = logsumexp_shape(d.problem);
  return empty(shape.dim, shape.size, aoti_torch_dtype_float32(), d.query.device_index);
}

// Computes attention into `out_tensor`, of which `out` is a view, and into `logsumexp`. The plan's
// workspace lies in `spare`, of `spare_bytes`, where that is large enough.
void run(const ForwardCall& call, const PlannedForward& planned, AtenTensorHandle out_tensor,
         const TensorView& out, const Handle& logsumexp, const Handle& spare = {},
         int64_t spare_bytes = 0) {
  const auto& [d, plan] = planned;
  if (plan.nothing_to_compute) {
    fill(out_tensor, 0);
    return fill(logsumexp.get(), -std::numeric_limits<double>::infinity());
  }
  const Problem& p = d.problem;
  const Readable query(call.query.get(), d.query, call.order),
      key(call.key.get(), d.key, call.order), value(call.value.get(), d.value, call.order);
  const ReadableBias bias(call.attn_bias, d.bias, p);
  ForwardArguments arguments;
  arguments.q = query.view;
  arguments.k = seen_keys(key.view, p);
  arguments.v = seen_keys(value.view, p);
  arguments.o = out;
  arguments.bias = bias.view;
  arguments.lse = static_cast<float*>(data(logsumexp.get()));
  Handle workspace;
  if (const int64_t bytes = plan.workspace.bytes) {
    if (bytes > spare_bytes)
      workspace = empty(1, &bytes, aoti_torch_dtype_uint8(), d.query.device_index);
    arguments.workspace = data(workspace ? workspace.get() : spare.get());
  }
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

}  // namespace

ForwardOutputs forward(const ForwardCall& call, const PlannedForward& planned,
                       int32_t dtype_of_number) {
  const ForwardDescription& d = planned.d;
  OutputShape shape(d.query, d.value);
  if (d.problem.peer == Peer::kEfficient) rows_first_strides(shape.size, shape.stride);
  const TensorInfo out = shape.info(d.query);
  ForwardOutputs outputs{empty(out), empty_logsumexp(d),
                         empty(0, nullptr, dtype_of_number, d.query.device_index)};
  // The workspace of packed calls is one counter of tiles, which fits into the number.
  run(call, planned, outputs.out.get(), view(outputs.out.get(), out, call.order), outputs.logsumexp,
      outputs.number, sizeof(int64_t));
  return outputs;
}

Handle forward_inplace(const ForwardCall& call, const PlannedForward& planned) {
  Handle logsumexp = empty_logsumexp(planned.d);
  Writable out(call.out.get(), call.order);
  run(call, planned, out.written(), out.view, logsumexp);
  out.finish();
  return logsumexp;
}

}  // namespace fa4::aten
