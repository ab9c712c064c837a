#include "describe.h"

#include <initializer_list>
#include <utility>

#include "../core/error.h"
#include "bias.h"
#include "context.h"
#include "inputs.h"
#include "stream.h"
#include "strides.h"
#include "torch_version.h"

namespace fa4::aten {
namespace {

using Reason = std::optional<std::string>;

// C++ callers can pass undefined tensors.
Reason check_defined(std::initializer_list<std::pair<const char*, const Handle*>> tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (!defined(tensor->get())) return concat(name, " is undefined");
  }
  return std::nullopt;
}

bool has_output_shape(const TensorInfo& tensor, const TensorInfo& query, const TensorInfo& value) {
  const OutputShape expected(query, value);
  return same_shape(tensor, expected.info(query));
}

// Finds out what the call runs on. Returns the reason why our kernels can't run there.
Reason find_target(const TensorInfo& q, const Processors* simulated, Problem& p, Target& target) {
  if (!simulated && driver_problem()) return driver_problem();
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
  return std::nullopt;
}

Reason describe_inputs(const Inputs& in, const Processors* simulated, Description& d) {
  if (in.dropout_p != 0) return "dropout_p must be 0";
  if (!simulated && in.q.device_type != aoti_torch_device_type_cuda())
    return "inputs must be CUDA tensors";
  if (Reason reason = check_tensors(in)) return reason;
  if (Reason reason = find_target(in.q, simulated, d.problem, d.target)) return reason;
  if (Reason reason = check_lengths(in)) return reason;
  fill_problem(in, d.problem);
  return std::nullopt;
}

// Returns the tensor's address, or without device memory its offset in a storage. Either one tells
// its alignment.
int64_t byte_offset(AtenTensorHandle tensor, const TensorInfo& given) {
  if (given.device_type == aoti_torch_device_type_cuda())
    return reinterpret_cast<int64_t>(data(tensor));
  int64_t offset;
  check_shim(aoti_torch_get_storage_offset(tensor, &offset), "reading a tensor's offset");
  return offset % kTmaBytes * kElementBytes;
}

// Whether TMA can read the tensor.
bool addressable(AtenTensorHandle tensor) {
  const TensorInfo given = info(tensor);
  return tma_can_address(given, byte_offset(tensor, given));
}

// cuDNN aligns the causal mask of packed calls top-left, but in torch 2.15 bottom-right if
// seqused_k is given. Our kernels take the first where the sequences have as many queries as keys,
// which one tensor of offsets for both proves without looking at the device.
Reason check_cudnn_alignment(bool is_causal, const Handle& cum_seq_q, const Handle& cum_seq_k) {
  if (!is_causal || (cum_seq_q && cum_seq_k && data(cum_seq_q.get()) == data(cum_seq_k.get())))
    return std::nullopt;
  return "cuDNN aligns is_causal top-left, which needs the same tensor for cum_seq_q and cum_seq_k";
}

Reason check_packed_cudnn(const ForwardCall& call) {
  // torch raises an error then, because the gradient would be of all keys.
  if ((call.seqused_k || call.block_table) &&
      wants_gradient({call.query.get(), call.key.get(), call.value.get()})) {
    return "cuDNN has no gradient with seqused_k or block_table";
  }
  if (call.seqused_k && torch_is_at_least(2, 15)) return std::nullopt;
  if (call.seqused_k && call.is_causal)
    return "cuDNN aligns is_causal top-left, which seqused_k makes another mask than bottom-right";
  return check_cudnn_alignment(call.is_causal, call.cum_seq_q, call.cum_seq_k);
}

// Whether the keys and values are a dense cache, of which each sequence uses as many rows as
// seqused_k says.
bool has_keys_in_use(const ForwardCall& call) {
  return call.is_own && call.seqused_k && !call.cum_seq_q;
}

Reason check_options(const ForwardCall& call) {
  if (call.attn_bias && call.peer == Peer::kFlash) return "attn_bias not supported";
  if (call.attn_bias && call.peer == Peer::kCudnn && wants_gradient({call.attn_bias.get()}))
    return "attn_bias must not require a gradient";
  if (call.return_debug_mask) return "return_debug_mask must be False";
  if (call.alibi_slopes) return "alibi_slopes not supported";
  if (call.seqused_k && !call.cum_seq_k && !call.block_table && !has_keys_in_use(call))
    return "seqused_k not supported without cum_seq_k";
  if (call.block_table && !call.seqused_k && !call.cum_seq_k)
    return "block_table must come with seqused_k or cum_seq_k";
  if (call.num_splits.value_or(0) < 0)
    return concat("num_splits must not be negative, is ", *call.num_splits);
  return std::nullopt;
}

Reason check_seqused(const TensorInfo& lengths, const TensorInfo& query, int64_t batch) {
  if (lengths.dim != 1 || lengths.size[0] != batch)
    return "seqused_k must be 1D with batch elements";
  return check_indices("seqused_k", lengths, query);
}

Reason check_out(const TensorInfo& out, const TensorInfo& query, const TensorInfo& value) {
  if (has_output_shape(out, query, value) && out.dtype == query.dtype && same_device(out, query))
    return std::nullopt;
  return "out must have query's shape, with value's head_dim, and query's dtype and device";
}

std::optional<TensorInfo> info_if_defined(const Handle& tensor) {
  return info_if_given(tensor && defined(tensor.get()) ? tensor.get() : nullptr);
}

// Forward and backward calls name these arguments alike.
template <class Call>
Inputs inputs_of(const Call& call, const Description& d, std::optional<TensorInfo> cum_seq_q,
                 std::optional<TensorInfo> cum_seq_k, std::optional<TensorInfo> block_table) {
  const bool top_left = call.is_causal && call.peer != Peer::kFlash && !cum_seq_q;
  return {d.query,
          d.key,
          d.value,
          std::move(cum_seq_q),
          std::move(cum_seq_k),
          std::move(block_table),
          d.bias,
          d.bias ? byte_offset(call.attn_bias.get(), *d.bias) : 0,
          call.max_q,
          call.max_k,
          call.dropout_p,
          call.is_causal,
          call.scale,
          call.window_size_left,
          call.window_size_right,
          call.order,
          top_left};
}

Reason describe_forward(const ForwardCall& call, const Processors* simulated, Description& d) {
  if (Reason reason =
          check_defined({{"query", &call.query}, {"key", &call.key}, {"value", &call.value}}))
    return reason;
  d.query = info(call.query.get());
  d.key = info(call.key.get());
  d.value = info(call.value.get());
  d.bias = info_if_defined(call.attn_bias);
  d.problem.num_splits = call.num_splits.value_or(0);
  d.problem.peer = call.peer;
  if (Reason reason = check_options(call)) return reason;
  const Inputs inputs =
      inputs_of(call, d, info_if_given(call.cum_seq_q.get()), info_if_given(call.cum_seq_k.get()),
                info_if_given(call.block_table.get()));
  if (Reason reason = describe_inputs(inputs, simulated, d)) return reason;
  if (call.peer == Peer::kCudnn && inputs.varlen()) {
    if (Reason reason = check_packed_cudnn(call)) return reason;
  }
  d.problem.keys_in_use = has_keys_in_use(call);
  // A copy would be of the whole cache.
  if ((call.block_table || d.problem.keys_in_use) &&
      !(addressable(call.key.get()) && addressable(call.value.get()))) {
    return concat(call.block_table ? "paged key and value" : "key and value with seqused_k",
                  " must have addresses and strides of multiples of 16 bytes");
  }
  if (call.seqused_k) {
    const TensorInfo seqused_k = info(call.seqused_k.get());
    if (Reason reason = check_seqused(seqused_k, d.query, d.problem.batch)) return reason;
  }
  return call.out ? check_out(info(call.out.get()), d.query, d.value) : std::nullopt;
}

Reason check_forward_results(const BackwardDescription& d) {
  if (d.grad_out.dtype != d.query.dtype || d.out.dtype != d.query.dtype)
    return "grad_out and out must have query's dtype";
  if (!has_output_shape(d.grad_out, d.query, d.value) ||
      !has_output_shape(d.out, d.query, d.value)) {
    return "grad_out and out must have query's shape, with value's head_dim";
  }
  if (!same_device(d.grad_out, d.query) || !same_device(d.out, d.query) ||
      !same_device(d.logsumexp, d.query)) {
    return "inputs must share device";
  }
  if (d.logsumexp.dtype != aoti_torch_dtype_float32()) return "logsumexp dtype must be float32";
  const LogsumexpShape expected = logsumexp_shape(d.problem);
  TensorInfo shape;
  shape.dim = expected.dim;
  shape.size = expected.size;
  if (!same_shape(d.logsumexp, shape)) return "logsumexp must have the forward's shape";
  return std::nullopt;
}

Reason describe_backward(const BackwardCall& call, BackwardDescription& d) {
  if (Reason reason = check_defined({{"grad_out", &call.grad_out},
                                     {"query", &call.query},
                                     {"key", &call.key},
                                     {"value", &call.value},
                                     {"out", &call.out},
                                     {"logsumexp", &call.logsumexp}}))
    return reason;
  d.grad_out = info(call.grad_out.get());
  d.query = info(call.query.get());
  d.key = info(call.key.get());
  d.value = info(call.value.get());
  d.bias = info_if_defined(call.attn_bias);
  d.out = info(call.out.get());
  d.logsumexp = info(call.logsumexp.get());
  d.problem.peer = call.peer;
  const Inputs inputs = inputs_of(call, d, info_if_defined(call.cum_seq_q),
                                  info_if_defined(call.cum_seq_k), std::nullopt);
  if (Reason reason = describe_inputs(inputs, nullptr, d)) return reason;
  if (call.peer == Peer::kCudnn && inputs.varlen()) {
    if (Reason reason = check_cudnn_alignment(call.is_causal, call.cum_seq_q, call.cum_seq_k))
      return reason;
  }
  return check_forward_results(d);
}

}  // namespace

ForwardDescription describe(const ForwardCall& call, const Processors* simulated) {
  ForwardDescription d;
  d.problem.op = Op::kForward;
  d.reason = describe_forward(call, simulated, d);
  return d;
}

BackwardDescription describe(const BackwardCall& call) {
  BackwardDescription d;
  d.problem.op = Op::kBackward;
  d.reason = describe_backward(call, d);
  return d;
}

LogsumexpShape logsumexp_shape(const Problem& p) {
  if (p.layout == Layout::kVarlen) return {2, {p.num_heads, p.total_q}};
  return {p.peer == Peer::kCudnn ? 4 : 3, {p.batch, p.num_heads, lse_rows(p), 1}};
}

TensorView seen_keys(TensorView keys, const Problem& problem) {
  if (problem.layout == Layout::kDense) keys.size[1] = problem.seqlen_k;
  return keys;
}

const int32_t* cu_seqlens(const Problem& problem, const Handle& cum_seq) {
  return problem.layout == Layout::kVarlen && cum_seq
             ? static_cast<const int32_t*>(data(cum_seq.get()))
             : nullptr;
}

std::optional<std::string> copied_inputs(const ForwardCall& call) {
  std::string names;
  for (const auto& [name, tensor] : {std::pair("query", &call.query), std::pair("key", &call.key),
                                     std::pair("value", &call.value)}) {
    if (!addressable(tensor->get())) names += names.empty() ? name : concat(", ", name);
  }
  return names.empty() ? std::nullopt : std::optional(names);
}

bool bias_is_copied(const ForwardCall& call, const ForwardDescription& d) {
  return d.bias &&
         !bias_is_readable(*d.bias, d.problem, byte_offset(call.attn_bias.get(), *d.bias));
}

}  // namespace fa4::aten
