#include "launch_decode.h"

#include <algorithm>

#include "argument_list.h"

namespace fa4 {
namespace {

// The kernel takes [batch, seqlen, heads, head_dim]: varlen tensors are one row of sequences.
TensorView with_batch(const TensorView& t, const Problem& p) {
  if (p.layout == Layout::kDense) return t;
  TensorView result = t;
  result.size[0] = 1;
  result.stride[0] = 0;
  std::copy_n(t.size, 3, result.size + 1);
  std::copy_n(t.stride, 3, result.stride + 1);
  return result;
}

}  // namespace

void decode(const Problem& p, const Plan& plan, const ForwardArguments& a, const Part& part,
            const Target& target) {
  const bool paged = p.page_size > 0;
  const auto of_part = [&part](const int32_t* data, int64_t stride) {
    return data ? data + part.batch * stride : nullptr;
  };
  ArgumentList list(p, *plan.kernel, part);
  list.add(with_batch(a.q, p));
  list.add(paged ? a.k : with_batch(a.k, p));
  list.add(paged ? a.v : with_batch(a.v, p));
  list.add(with_batch(a.o, p));
  list.add_rows(a.lse, p.num_heads, lse_rows(p));
  list.add(a.softmax_scale);
  list.add_integers(of_part(a.cu_seqlens_q, 1), part.batches + 1);
  list.add_integers(of_part(a.cu_seqlens_k, 1), part.batches + 1);
  list.add_integers(of_part(a.seqused_k, 1), part.batches);
  list.add_table(of_part(a.block_table, a.block_table_stride), part.batches, a.block_table_columns,
                 a.block_table_stride);
  list.add(plan.window_size_left);
  list.add(plan.window_size_right);
  list.add(static_cast<int32_t>(p.seqlen_q));
  list.launch_split(plan.splits, target);
}

}  // namespace fa4
