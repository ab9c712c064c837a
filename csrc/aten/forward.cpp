#include "forward.h"

#include <limits>

#include "../core/launch/launch.h"
#include "decide.h"
#include "profile_range.h"
#include "torch_errors.h"

namespace fa4::aten {

WorkspaceMemory::WorkspaceMemory(const Plan& plan, int32_t device, const Handle& spare,
                                 int64_t spare_bytes) {
  const int64_t bytes = plan.workspace.bytes;
  if (bytes == 0) return;
  if (bytes > spare_bytes) own_ = empty(1, &bytes, aoti_torch_dtype_uint8(), device);
  data_ = aten::data(own_ ? own_.get() : spare.get());
}

Handle empty_logsumexp(const ForwardDescription& d) {
  const LogsumexpShape shape = logsumexp_shape(d.problem);
  return empty(shape.dim, shape.size, aoti_torch_dtype_float32(), d.query.device_index);
}

void forward(const ForwardCall& call, const ForwardDescription& d, const Plan& plan,
             AtenTensorHandle out_tensor, const TensorView& out, const Handle& logsumexp,
             const WorkspaceMemory& workspace) {
  if (plan.nothing_to_compute) {
    fill(out_tensor, 0);
    return fill(logsumexp.get(), -std::numeric_limits<double>::infinity());
  }
  const Problem& p = d.problem;
  const Readable query(call.query.get(), d.query, call.order),
      key(call.key.get(), d.key, call.order), value(call.value.get(), d.value, call.order);
  ForwardArguments arguments;
  arguments.q = query.view;
  arguments.k = seen_keys(key.view, p);
  arguments.v = seen_keys(value.view, p);
  arguments.o = out;
  arguments.lse = static_cast<float*>(data(logsumexp.get()));
  arguments.workspace = workspace.data();
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

Handle forward_inplace(const ForwardCall& call, const ForwardDescription& d, const Plan& plan) {
  Handle logsumexp = empty_logsumexp(d);
  Writable out(call.out.get(), call.order);
  forward(call, d, plan, out.tensor, out.view, logsumexp,
          WorkspaceMemory(plan, d.query.device_index));
  out.finish();
  return logsumexp;
}

}  // namespace fa4::aten
