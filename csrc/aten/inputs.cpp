#include "inputs.h"

#include <algorithm>
#include <cmath>

#include "../core/error.h"
#include "../core/integers.h"
#include "bias.h"
#include "strides.h"

namespace fa4::aten {
namespace {

using Reason = std::optional<std::string>;

Reason check_devices_and_dtypes(const Inputs& in) {
  const auto &q = in.q, &k = in.k, &v = in.v;
  if (!same_device(q, k) || !same_device(q, v)) return "query, key, value must be on same device";
  if (q.dtype != aoti_torch_dtype_bfloat16() && q.dtype != aoti_torch_dtype_float16())
    return "query dtype must be float16 or bfloat16";
  if (k.dtype != q.dtype || v.dtype != q.dtype) return "query, key, value must have the same dtype";
  return std::nullopt;
}

Reason check_ranks(const Inputs& in) {
  const bool varlen = in.varlen(), paged = in.paged();
  if (paged && !varlen) return "block_table must come with cum_seq_q";
  if (!paged && varlen != in.cum_seq_k.has_value())
    return "cum_seq_q and cum_seq_k must be given together";
  if (varlen && in.order == DimOrder::kHeadsFirst)
    return "cum_seq_q and cum_seq_k must be undefined for dense inputs";
  if (!varlen && in.q.dim != 4) return "dense query must be 4D";
  if (varlen && in.q.dim != 3) return "ragged query must be 3D";
  if (paged && (in.k.dim != 4 || in.v.dim != 4)) return "paged key and value must be 4D";
  if (!paged && (in.k.dim != in.q.dim || in.v.dim != in.q.dim))
    return "query, key, value must have the same rank";
  return std::nullopt;
}

Reason check_strides(const Inputs& in) {
  for (const TensorInfo* tensor : {&in.q, &in.k, &in.v}) {
    if (tensor->stride[tensor->dim - 1] != 1)
      return "query, key, value must have a contiguous last dimension";
    int64_t result[kMaxDim];  // the strides of the output or gradient that PyTorch promises for it
    empty_like_strides(tensor->dim, tensor->size, tensor->stride, result);
    if (result[tensor->dim - 1] != 1) return "query, key, value must not overlap themselves";
  }
  if (OutputShape(in.q, in.v).stride[in.q.dim - 1] != 1) return "query must not overlap itself";
  return std::nullopt;
}

Reason check_scale(const Inputs& in) {
  // The kernels scale scores after masking them with -inf, so a scale of 0 or less gives NaN. So
  // does the stock kernel, which runs these calls: its result is PyTorch's.
  const float scale = static_cast<float>(in.scale.value_or(1));
  if (std::isnormal(scale) && scale > 0) return std::nullopt;
  return concat("scale must be a positive normal number of float32, is ", *in.scale);
}

Reason check_shapes(const Inputs& in) {
  const auto &q = in.q, &k = in.k, &v = in.v;
  const int64_t head_dim = q.size[q.dim - 1], head_dim_k = k.size[k.dim - 1];
  for (int64_t d = 0; d < k.dim - 1; ++d) {
    if (k.size[d] != v.size[d]) return "key and value must have the same shape";
  }
  if (head_dim_k != head_dim)
    return concat("key's head_dim ", head_dim_k, " differs from query's ", head_dim);
  if (!in.varlen() && k.size[0] != q.size[0])
    return concat("key's batch ", k.size[0], " differs from query's ", q.size[0]);
  return std::nullopt;
}

Reason check_cum_seq(const char* name, const TensorInfo& lengths, const TensorInfo& query) {
  if (lengths.dim != 1 || lengths.size[0] < 1)
    return concat(name, " must be 1D with batch + 1 elements");
  return check_indices(name, lengths, query);
}

Reason check_block_table(const TensorInfo& table, const TensorInfo& query, int64_t batch) {
  if (table.dim != 2 || table.size[0] != batch) return "block_table must be 2D with batch rows";
  return check_indices("block_table", table, query);
}

// The most keys that a sequence of a varlen call can have.
int64_t most_keys(const Inputs& in) {
  return in.paged() ? bounded_product(in.block_table->size[1], in.k.size[1]) : in.k.size[0];
}

// Whether the pages of a cache are rows of one tensor, as Problem::pages_in_rows says.
bool lies_in_rows(const TensorInfo& cache) {
  const int64_t pages = cache.size[0], page = cache.stride[0], row = cache.stride[1];
  if (pages <= 1) return true;
  return row > 0 && page % row == 0 && bounded_product(pages, page / row) < kUnbounded;
}

// A bound for the longest sequence, since a caller may pass any number. 0 is not taken as "no
// rows": only cu_seqlens says that.
int64_t longest(int64_t given, int64_t most) { return given ? std::min(given, most) : most; }

void fill_varlen(const Inputs& in, Problem& p) {
  p.layout = Layout::kVarlen;
  p.batch = in.cum_seq_q->size[0] - 1;
  p.total_q = in.q.size[0];
  p.total_k = in.k.size[0];
  if (in.paged()) {
    p.page_size = in.k.size[1];
    p.total_k = bounded_product(in.k.size[0], p.page_size);
    p.pages_in_rows = lies_in_rows(in.k) && lies_in_rows(in.v);
  }
  p.seqlen_q = longest(in.max_q, p.total_q);
  p.seqlen_k = longest(in.max_k, most_keys(in));
  p.longest_is_zero = (!in.max_q && p.seqlen_q) || (!in.max_k && p.seqlen_k);
}

// Lengths come from the shapes: max_q may describe the tensor that these are views of.
void fill_dense(const Inputs& in, Problem& p) {
  const int64_t seqlen = in.order == DimOrder::kHeadsFirst ? 2 : 1;
  p.layout = Layout::kDense;
  p.batch = in.q.size[0];
  p.seqlen_q = in.q.size[seqlen];
  p.seqlen_k = in.k.size[seqlen];
  // Under a top-left causal mask no query sees the keys behind its own row.
  p.causal_top_left = in.causal_top_left;
  if (p.causal_top_left) p.seqlen_k = std::min(p.seqlen_k, p.seqlen_q);
  p.total_q = bounded_product(p.batch, p.seqlen_q);
  p.total_k = bounded_product(p.batch, p.seqlen_k);
}

}  // namespace

std::optional<TensorInfo> info_if_given(AtenTensorHandle tensor) {
  return tensor ? std::optional(info(tensor)) : std::nullopt;
}

bool same_shape(const TensorInfo& a, const TensorInfo& b) {
  return a.dim == b.dim && std::equal(a.size, a.size + a.dim, b.size);
}

bool same_device(const TensorInfo& a, const TensorInfo& b) {
  return a.device_type == b.device_type && a.device_index == b.device_index;
}

Reason check_indices(const char* name, const TensorInfo& indices, const TensorInfo& query) {
  if (indices.dtype != aoti_torch_dtype_int32()) return concat(name, " must be int32");
  if (indices.stride[indices.dim - 1] != 1 && indices.size[indices.dim - 1] > 1)
    return concat(name, " must be contiguous");
  if (!same_device(indices, query)) return concat(name, " must be on query's device");
  return std::nullopt;
}

Reason check_tensors(const Inputs& in) {
  for (const auto check : {check_devices_and_dtypes, check_ranks, check_strides, check_scale,
                           check_shapes, check_bias}) {
    if (Reason reason = check(in)) return reason;
  }
  return std::nullopt;
}

Reason check_lengths(const Inputs& in) {
  if (!in.varlen()) return std::nullopt;
  if (Reason reason = check_cum_seq("cum_seq_q", *in.cum_seq_q, in.q)) return reason;
  const int64_t length_q = in.cum_seq_q->size[0];
  if (in.cum_seq_k) {
    if (Reason reason = check_cum_seq("cum_seq_k", *in.cum_seq_k, in.q)) return reason;
    const int64_t length_k = in.cum_seq_k->size[0];
    if (length_q != length_k)
      return concat("cum_seq_q has ", length_q, " elements, cum_seq_k ", length_k);
  }
  if (in.paged()) {
    if (Reason reason = check_block_table(*in.block_table, in.q, length_q - 1)) return reason;
  }
  if (in.max_q < 0 || in.max_k < 0)
    return concat("max_q and max_k must not be negative, are ", in.max_q, " and ", in.max_k);
  const int64_t most = most_keys(in);
  if (in.paged() && most >= kUnbounded)
    return concat("a row of block_table must hold less than 2^30 keys, holds ", most);
  // The stock kernel drops a window bound of max_k or more, our planner one of seqlen_k or more. If
  // a sequence has more queries than keys, dropping the right bound changes the result.
  const int64_t seqlen_k = longest(in.max_k, most), right = in.window_size_right.value_or(-1);
  if (!in.is_causal && seqlen_k && right >= seqlen_k && right < in.max_k) {
    return concat("window_size_right, ", right, ", is less than max_k, ", in.max_k,
                  ", but not than key's ", most, " rows");
  }
  return std::nullopt;
}

void fill_problem(const Inputs& in, Problem& p) {
  const int64_t heads = in.order == DimOrder::kHeadsFirst ? 1 : in.q.dim - 2;
  p.dtype = in.q.dtype == aoti_torch_dtype_bfloat16() ? Dtype::kBf16 : Dtype::kFp16;
  p.num_heads = in.q.size[heads];
  p.num_heads_kv = in.k.size[in.paged() ? 2 : heads];
  p.head_dim = in.q.size[in.q.dim - 1];
  p.head_dim_v = in.v.size[in.v.dim - 1];
  p.is_causal = in.is_causal;
  p.window_size_left = in.window_size_left.value_or(-1);
  p.window_size_right = in.window_size_right.value_or(-1);
  in.varlen() ? fill_varlen(in, p) : fill_dense(in, p);
  fill_bias(in, p);
}

}  // namespace fa4::aten
