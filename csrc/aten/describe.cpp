#include "describe.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>

#include "../core/error.h"
#include "../core/integers.h"
#include "context.h"
#include "options.h"
#include "stream.h"
#include "strides.h"

namespace fa4::aten {
namespace {

bool same_shape(const TensorInfo& a, const TensorInfo& b) {
  if (a.dim != b.dim) return false;
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.size[d] != b.size[d]) return false;
  }
  return true;
}

bool same_device(const TensorInfo& a, const TensorInfo& b) {
  return a.device_type == b.device_type && a.device_index == b.device_index;
}

// Which of these is undefined, as C++ callers can have it; empty: none.
std::string undefined_one(std::initializer_list<std::pair<const char*, const Handle*>> tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (!defined(tensor->get())) return concat(name, " is undefined");
  }
  return {};
}

bool has_output_shape(const TensorInfo& tensor, const TensorInfo& query, const TensorInfo& value) {
  const OutputShape expected(query, value);
  TensorInfo shape;
  shape.dim = query.dim;
  shape.size = expected.size;
  return same_shape(tensor, shape);
}

std::string check_indices(const char* name, const TensorInfo& indices, const TensorInfo& query) {
  if (indices.dtype != aoti_torch_dtype_int32()) return concat(name, " must be int32");
  if (indices.stride[indices.dim - 1] != 1 && indices.size[indices.dim - 1] > 1)
    return concat(name, " must be contiguous");
  if (!same_device(indices, query)) return concat(name, " must be on query's device");
  return {};
}

std::string check_cum_seq(const char* name, const TensorInfo& lengths, const TensorInfo& query) {
  if (lengths.dim != 1 || lengths.size[0] < 1)
    return concat(name, " must be 1D with batch + 1 elements");
  return check_indices(name, lengths, query);
}

std::string check_seqused(const TensorInfo& lengths, const TensorInfo& query, int64_t batch) {
  if (lengths.dim != 1 || lengths.size[0] != batch)
    return "seqused_k must be 1D with batch elements";
  return check_indices("seqused_k", lengths, query);
}

std::string check_block_table(const TensorInfo& table, const TensorInfo& query, int64_t batch) {
  if (table.dim != 2 || table.size[0] != batch) return "block_table must be 2D with batch rows";
  return check_indices("block_table", table, query);
}

// Everything that forward and backward ask of query, key and value alike.
struct Inputs {
  AtenTensorHandle cum_seq_q, cum_seq_k;  // null when dense
  AtenTensorHandle block_table;           // null when not paged
  int64_t max_q, max_k;
  double dropout_p;
  bool is_causal;
  std::optional<double> scale;
  std::optional<int64_t> window_size_left, window_size_right;
  DimOrder order;
};

// What the call runs on, or why our kernels can't run there.
std::string describe_target(const TensorInfo& q, const Processors* simulated, Problem& p,
                            Target& target) {
  if (!simulated && !driver_problem().empty()) return driver_problem();
  target.device = q.device_index;
  if (!simulated) target.stream = current_stream(q.device_index);
  try {
    const Processors found = simulated ? *simulated : processors(q.device_index, target.stream);
    target.whole_device = found.whole_device;
    p.capability = found.capability;
    p.sm_count = found.sm_count;
  } catch (const Error& error) {  // the driver does not say what the device is
    return error.what();
  }
  return {};
}

std::string describe_inputs(const Inputs& in, const TensorInfo& q, const TensorInfo& k,
                            const TensorInfo& v, const Processors* simulated, Problem& p,
                            Target& target) {
  if (in.dropout_p != 0) return "dropout_p must be 0";
  if (!simulated && q.device_type != aoti_torch_device_type_cuda())
    return "inputs must be CUDA tensors";
  if (!same_device(q, k) || !same_device(q, v)) return "query, key, value must be on same device";
  if (q.dtype != aoti_torch_dtype_bfloat16() && q.dtype != aoti_torch_dtype_float16())
    return "query dtype must be float16 or bfloat16";
  if (k.dtype != q.dtype || v.dtype != q.dtype) return "query, key, value must have the same dtype";
  const bool varlen = in.cum_seq_q != nullptr, paged = in.block_table != nullptr;
  if (paged && !varlen) return "block_table must come with cum_seq_q";
  if (!paged && varlen != (in.cum_seq_k != nullptr))
    return "cum_seq_q and cum_seq_k must be given together";
  if (varlen && in.order == DimOrder::kHeadsFirst)
    return "cum_seq_q and cum_seq_k must be undefined for dense inputs";
  if (!varlen && q.dim != 4) return "dense query must be 4D";
  if (varlen && q.dim != 3) return "ragged query must be 3D";
  if (paged && (k.dim != 4 || v.dim != 4)) return "paged key and value must be 4D";
  if (!paged && (k.dim != q.dim || v.dim != q.dim))
    return "query, key, value must have the same rank";
  for (const TensorInfo* tensor : {&q, &k, &v}) {
    if (tensor->stride[tensor->dim - 1] != 1)
      return "query, key, value must have a contiguous last dimension";
    int64_t result[kMaxDim];  // the strides of the output or gradient that PyTorch promises for it
    empty_like_strides(tensor->dim, tensor->size, tensor->stride, result);
    if (result[tensor->dim - 1] != 1) return "query, key, value must not overlap themselves";
  }
  if (OutputShape(q, v).stride[q.dim - 1] != 1) return "query must not overlap itself";
  // The kernels scale scores after masking them with -inf; so does the stock kernel, but its NaN is
  // what PyTorch answers.
  if (const float scale = static_cast<float>(in.scale.value_or(1));
      !std::isnormal(scale) || scale < 0) {
    return concat("scale must be a positive normal number of float32, is ", *in.scale);
  }
  const int64_t heads = in.order == DimOrder::kHeadsFirst ? 1 : q.dim - 2,
                seqlen = varlen ? 0 : 3 - heads;
  const int64_t head_dim = q.size[q.dim - 1], head_dim_k = k.size[k.dim - 1];
  for (int64_t d = 0; d < k.dim - 1; ++d) {
    if (k.size[d] != v.size[d]) return "key and value must have the same shape";
  }
  if (head_dim_k != head_dim)
    return concat("key's head_dim ", head_dim_k, " differs from query's ", head_dim);
  if (!varlen && k.size[0] != q.size[0])
    return concat("key's batch ", k.size[0], " differs from query's ", q.size[0]);

  if (std::string reason = describe_target(q, simulated, p, target); !reason.empty()) return reason;
  p.tile = options().tile.load(std::memory_order_relaxed);
  p.dealing = options().dealing.load(std::memory_order_relaxed);
  p.decode = options().decode.load(std::memory_order_relaxed);
  p.dtype = q.dtype == aoti_torch_dtype_bfloat16() ? Dtype::kBf16 : Dtype::kFp16;
  p.num_heads = q.size[heads];
  p.num_heads_kv = k.size[paged ? 2 : heads];
  p.head_dim = head_dim;
  p.head_dim_v = v.size[v.dim - 1];
  p.is_causal = in.is_causal;
  p.window_size_left = in.window_size_left.value_or(-1);
  p.window_size_right = in.window_size_right.value_or(-1);
  if (varlen) {
    const TensorInfo cum_seq_q = info(in.cum_seq_q);
    if (std::string reason = check_cum_seq("cum_seq_q", cum_seq_q, q); !reason.empty())
      return reason;
    const int64_t length_q = cum_seq_q.size[0];
    if (in.cum_seq_k) {
      const TensorInfo cum_seq_k = info(in.cum_seq_k);
      if (std::string reason = check_cum_seq("cum_seq_k", cum_seq_k, q); !reason.empty())
        return reason;
      const int64_t length_k = cum_seq_k.size[0];
      if (length_q != length_k)
        return concat("cum_seq_q has ", length_q, " elements, cum_seq_k ", length_k);
    }
    p.layout = Layout::kVarlen;
    p.batch = length_q - 1;
    p.total_q = q.size[0];
    p.total_k = k.size[0];
    int64_t most_keys = p.total_k;
    if (paged) {
      const TensorInfo block_table = info(in.block_table);
      if (std::string reason = check_block_table(block_table, q, p.batch); !reason.empty())
        return reason;
      p.page_size = k.size[1];
      p.total_k = bounded_product(k.size[0], p.page_size);
      most_keys = bounded_product(block_table.size[1], p.page_size);
    }
    if (in.max_q < 0 || in.max_k < 0)
      return concat("max_q and max_k must not be negative, are ", in.max_q, " and ", in.max_k);
    if (most_keys >= kUnbounded)
      return concat("a row of block_table must hold less than 2^30 keys, holds ", most_keys);
    // A caller may pass any bound for "the longest". That no sequence has a row is for cu_seqlens
    // to say.
    p.seqlen_q = in.max_q ? std::min(in.max_q, p.total_q) : p.total_q;
    p.seqlen_k = in.max_k ? std::min(in.max_k, most_keys) : most_keys;
    // The stock kernel drops a window bound of max_k or more, our planner one of seqlen_k or more.
    // Where a sequence has more queries than keys, dropping the right one shows.
    if (!p.is_causal && p.seqlen_k && p.window_size_right >= p.seqlen_k &&
        p.window_size_right < in.max_k) {
      return concat("window_size_right, ", p.window_size_right, ", is less than max_k, ", in.max_k,
                    ", but not than key's ", most_keys, " rows");
    }
  } else {  // lengths come from the shapes: a caller's max_q may be of the tensor that these are
            // views of
    p.layout = Layout::kDense;
    p.batch = q.size[0];
    p.seqlen_q = q.size[seqlen];
    p.seqlen_k = k.size[seqlen];
    p.total_q = bounded_product(p.batch, p.seqlen_q);
    p.total_k = bounded_product(p.batch, p.seqlen_k);
  }
  return {};
}

}  // namespace

LogsumexpShape logsumexp_shape(const Problem& p) {
  if (p.layout == Layout::kVarlen) return {2, {p.num_heads, p.total_q}};
  return {3, {p.batch, p.num_heads, p.seqlen_q}};
}

const int32_t* cu_seqlens(const Problem& problem, const Handle& cum_seq) {
  return problem.layout == Layout::kVarlen && cum_seq
             ? static_cast<const int32_t*>(data(cum_seq.get()))
             : nullptr;
}

namespace {

// By its address, or by its offset in a storage where it has no memory of a device.
bool addressable(AtenTensorHandle tensor) {
  const TensorInfo given = info(tensor);
  int64_t offset;
  if (given.device_type == aoti_torch_device_type_cuda()) {
    offset = reinterpret_cast<int64_t>(data(tensor));
  } else {
    check_shim(aoti_torch_get_storage_offset(tensor, &offset), "reading a tensor's offset");
    offset = offset % kTmaBytes * kElementBytes;  // all that counts of it
  }
  return tma_can_address(given, offset);
}

}  // namespace

std::string copies(const ForwardCall& call) {
  std::string names;
  const auto add = [&names](const char* name, AtenTensorHandle tensor) {
    if (!addressable(tensor)) names += names.empty() ? name : concat(", ", name);
  };
  add("query", call.query.get());
  add("key", call.key.get());
  add("value", call.value.get());
  return names.empty()
             ? names
             : concat("copied first, because TMA takes addresses and strides of 16 bytes only: ",
                      names);
}

ForwardDescription describe(const ForwardCall& call, const Processors* simulated) {
  ForwardDescription d;
  d.problem.op = Op::kForward;
  d.reason = undefined_one({{"query", &call.query}, {"key", &call.key}, {"value", &call.value}});
  if (!d.reason.empty()) return d;
  d.query = info(call.query.get());
  d.key = info(call.key.get());
  d.value = info(call.value.get());
  d.problem.num_splits = call.num_splits.value_or(0);
  const Inputs inputs{call.cum_seq_q.get(),
                      call.cum_seq_k.get(),
                      call.block_table.get(),
                      call.max_q,
                      call.max_k,
                      call.dropout_p,
                      call.is_causal,
                      call.scale,
                      call.window_size_left,
                      call.window_size_right,
                      call.order};
  if (call.return_debug_mask) {
    d.reason = "return_debug_mask must be False";
  } else if (call.alibi_slopes) {
    d.reason = "alibi_slopes not supported";
  } else if (call.seqused_k && !call.cum_seq_k && !call.block_table) {
    d.reason = "seqused_k not supported without cum_seq_k";
  } else if (call.block_table && !call.seqused_k && !call.cum_seq_k) {
    d.reason = "block_table must come with seqused_k or cum_seq_k";
  } else if (call.num_splits.value_or(0) < 0) {
    d.reason = concat("num_splits must not be negative, is ", *call.num_splits);
  } else {
    d.reason = describe_inputs(inputs, d.query, d.key, d.value, simulated, d.problem, d.target);
  }
  if (d.reason.empty() && call.block_table &&
      !(addressable(call.key.get()) && addressable(call.value.get()))) {
    d.reason =
        "paged key and value must have addresses and strides of multiples of 16 bytes";  // a copy
                                                                                         // would be
                                                                                         // of the
                                                                                         // whole
                                                                                         // cache
  }
  if (d.reason.empty() && call.seqused_k)
    d.reason = check_seqused(info(call.seqused_k.get()), d.query, d.problem.batch);
  if (d.reason.empty() && call.out) {
    const TensorInfo out = info(call.out.get());
    if (!has_output_shape(out, d.query, d.value) || out.dtype != d.query.dtype ||
        !same_device(out, d.query)) {
      d.reason = "out must have query's shape, with value's head_dim, and query's dtype and device";
    }
  }
  return d;
}

BackwardDescription describe(const BackwardCall& call) {
  BackwardDescription d;
  d.problem.op = Op::kBackward;
  d.reason = undefined_one({{"grad_out", &call.grad_out},
                            {"query", &call.query},
                            {"key", &call.key},
                            {"value", &call.value},
                            {"out", &call.out},
                            {"logsumexp", &call.logsumexp}});
  if (!d.reason.empty()) return d;
  d.grad_out = info(call.grad_out.get());
  d.query = info(call.query.get());
  d.key = info(call.key.get());
  d.value = info(call.value.get());
  d.out = info(call.out.get());
  d.logsumexp = info(call.logsumexp.get());
  const auto if_defined = [](const Handle& tensor) {
    return defined(tensor.get()) ? tensor.get() : nullptr;
  };
  const Inputs inputs{if_defined(call.cum_seq_q),
                      if_defined(call.cum_seq_k),
                      nullptr,
                      call.max_q,
                      call.max_k,
                      call.dropout_p,
                      call.is_causal,
                      call.scale,
                      call.window_size_left,
                      call.window_size_right,
                      call.order};
  d.problem.deterministic = deterministic_algorithms();
  d.reason = describe_inputs(inputs, d.query, d.key, d.value, nullptr, d.problem, d.target);
  if (!d.reason.empty()) return d;
  if (d.grad_out.dtype != d.query.dtype || d.out.dtype != d.query.dtype) {
    d.reason = "grad_out and out must have query's dtype";
  } else if (!has_output_shape(d.grad_out, d.query, d.value) ||
             !has_output_shape(d.out, d.query, d.value)) {
    d.reason = "grad_out and out must have query's shape, with value's head_dim";
  } else if (!same_device(d.grad_out, d.query) || !same_device(d.out, d.query) ||
             !same_device(d.logsumexp, d.query)) {
    d.reason = "inputs must share device";
  } else if (d.logsumexp.dtype != aoti_torch_dtype_float32()) {
    d.reason = "logsumexp dtype must be float32";
  } else {
    const LogsumexpShape expected = logsumexp_shape(d.problem);
    TensorInfo shape;
    shape.dim = expected.dim;
    shape.size = expected.size;
    if (!same_shape(d.logsumexp, shape))
      d.reason = "logsumexp must be [batch, heads, seqlen_q], or [heads, total_q] when ragged";
  }
  return d;
}

}  // namespace fa4::aten
