#include "calls.h"

#include <utility>

#include "../core/error.h"
#include "torch_version.h"

namespace fa4::aten {
namespace {

template <class Call>
void take_qkv(Arguments& arguments, Call& call) {
  call.query = arguments.tensor();
  call.key = arguments.tensor();
  call.value = arguments.tensor();
}

// Every backward op begins with these.
void take_backward_tensors(Arguments& arguments, BackwardCall& call) {
  call.grad_out = arguments.tensor();
  take_qkv(arguments, call);
  call.out = arguments.tensor();
  call.logsumexp = arguments.tensor();
}

// _flash_attention_forward and our own ops have these next to each other.
template <class Call>
void take_lengths(Arguments& arguments, Call& call) {
  call.cum_seq_q = arguments.optional_tensor();
  call.cum_seq_k = arguments.optional_tensor();
  call.max_q = arguments.value<int64_t>();
  call.max_k = arguments.value<int64_t>();
}

template <class Call>
void take_scale_and_mask(Arguments& arguments, Call& call) {
  call.scale = arguments.value<std::optional<double>>();
  call.is_causal = arguments.value<bool>();
  call.window_size_left = arguments.value<int64_t>();
  call.window_size_right = arguments.value<int64_t>();
}

// The scaled_dot_product ops with a bias begin with these.
void take_biased_sdpa(Arguments& arguments, ForwardCall& call) {
  call.order = DimOrder::kHeadsFirst;
  take_qkv(arguments, call);
  call.attn_bias = arguments.optional_tensor();
  call.compute_log_sumexp = arguments.value<bool>();
  call.dropout_p = arguments.value<double>();
  call.is_causal = arguments.value<bool>();
}

// The backward ops of torch take an undefined tensor where there is none.
Handle or_undefined(Handle tensor) { return tensor ? std::move(tensor) : undefined(); }

}  // namespace

void refuse(const KnownOp& op, uint64_t num_inputs, uint64_t num_outputs) {
  const std::string first = op.inputs[0] == op.inputs[1] ? "" : concat(op.inputs[0], " or ");
  fail("this torch has ", num_inputs, " arguments and ", num_outputs, " results for ", op.name,
       ", fa4_ext knows ", first, op.inputs[1], " arguments and ", op.outputs,
       " results: it needs a newer fa4_ext");
}

ForwardCall take_sdpa_forward(Arguments& arguments) {
  ForwardCall call;
  call.op = kSdpaForward.name;
  call.order = DimOrder::kHeadsFirst;
  take_qkv(arguments, call);
  call.dropout_p = arguments.value<double>();
  call.is_causal = arguments.value<bool>();
  call.return_debug_mask = arguments.value<bool>();
  call.scale = arguments.value<std::optional<double>>();
  return call;
}

ForwardCall take_flash_forward(Arguments& arguments, bool has_block_table) {
  ForwardCall call;
  call.op = kFlashForward.name;
  call.is_low_level = true;
  call.order = DimOrder::kSequenceFirst;
  take_qkv(arguments, call);
  take_lengths(arguments, call);
  call.dropout_p = arguments.value<double>();
  call.is_causal = arguments.value<bool>();
  call.return_debug_mask = arguments.value<bool>();
  call.scale = arguments.value<std::optional<double>>();
  call.window_size_left = arguments.value<std::optional<int64_t>>();
  call.window_size_right = arguments.value<std::optional<int64_t>>();
  call.seqused_k = arguments.optional_tensor();
  call.alibi_slopes = arguments.optional_tensor();
  call.has_block_table = has_block_table;
  if (has_block_table) {
    call.block_table = arguments.optional_tensor();
    call.num_splits = arguments.value<std::optional<int64_t>>();
  }
  return call;
}

ForwardCall take_flash_forward_inplace(Arguments& arguments) {
  Handle out = arguments.tensor();
  ForwardCall call = take_flash_forward(arguments, true);
  call.op = kFlashForwardInplace.name;
  call.out = std::move(out);
  return call;
}

BackwardCall take_backward(Arguments& arguments, const KnownOp& op, DimOrder order) {
  BackwardCall call;
  call.op = op.name;
  call.is_low_level = &op == &kFlashBackward;
  call.order = order;
  take_backward_tensors(arguments, call);
  call.cum_seq_q = arguments.tensor();
  call.cum_seq_k = arguments.tensor();
  call.max_q = arguments.value<int64_t>();
  call.max_k = arguments.value<int64_t>();
  call.dropout_p = arguments.value<double>();
  call.is_causal = arguments.value<bool>();
  call.rng_state = arguments.tensor();
  call.unused = arguments.tensor();
  call.scale = arguments.value<std::optional<double>>();
  if (order == DimOrder::kSequenceFirst) {
    call.window_size_left = arguments.value<std::optional<int64_t>>();
    call.window_size_right = arguments.value<std::optional<int64_t>>();
  }
  return call;
}

ForwardCall take_cudnn_sdpa_forward(Arguments& arguments) {
  ForwardCall call;
  call.op = kCudnnSdpaForward.name;
  call.peer = Peer::kCudnn;
  take_biased_sdpa(arguments, call);
  call.return_debug_mask = arguments.value<bool>();
  call.scale = arguments.value<std::optional<double>>();
  return call;
}

ForwardCall take_cudnn_forward(Arguments& arguments, bool has_block_table) {
  ForwardCall call;
  call.op = kCudnnForward.name;
  call.is_low_level = true;
  call.peer = Peer::kCudnn;
  take_qkv(arguments, call);
  call.attn_bias = arguments.optional_tensor();
  call.cum_seq_q = arguments.optional_tensor();
  call.order = call.cum_seq_q ? DimOrder::kSequenceFirst : DimOrder::kHeadsFirst;
  call.cum_seq_k = arguments.optional_tensor();
  call.max_q = arguments.value<int64_t>();
  call.max_k = arguments.value<int64_t>();
  call.compute_log_sumexp = arguments.value<bool>();
  call.dropout_p = arguments.value<double>();
  call.is_causal = arguments.value<bool>();
  call.return_debug_mask = arguments.value<bool>();
  call.scale = arguments.value<std::optional<double>>();
  call.has_block_table = has_block_table;
  if (has_block_table) {
    call.seqused_k = arguments.optional_tensor();
    call.block_table = arguments.optional_tensor();
  }
  return call;
}

ForwardCall take_cudnn_forward_inplace(Arguments& arguments) {
  ForwardCall call;
  call.op = kCudnnForwardInplace.name;
  call.is_low_level = true;
  call.peer = Peer::kCudnn;
  call.order = DimOrder::kSequenceFirst;
  call.out = arguments.tensor();
  take_qkv(arguments, call);
  call.cum_seq_q = arguments.tensor();
  call.cum_seq_k = arguments.optional_tensor();
  call.max_q = arguments.value<int64_t>();
  call.max_k = arguments.value<int64_t>();
  call.is_causal = arguments.value<bool>();
  call.scale = arguments.value<std::optional<double>>();
  call.seqused_k = arguments.optional_tensor();
  call.block_table = arguments.optional_tensor();
  return call;
}

BackwardCall take_cudnn_backward(Arguments& arguments, const KnownOp& op) {
  BackwardCall call;
  call.op = op.name;
  call.is_low_level = &op == &kCudnnBackward;
  call.peer = Peer::kCudnn;
  take_backward_tensors(arguments, call);
  call.rng_state = arguments.tensor();
  call.unused = arguments.tensor();
  call.attn_bias = arguments.tensor();
  call.cum_seq_q = arguments.tensor();
  const bool packed = call.is_low_level && defined(call.cum_seq_q.get());
  call.order = packed ? DimOrder::kSequenceFirst : DimOrder::kHeadsFirst;
  call.cum_seq_k = arguments.tensor();
  call.max_q = arguments.value<int64_t>();
  call.max_k = arguments.value<int64_t>();
  call.dropout_p = arguments.value<double>();
  call.is_causal = arguments.value<bool>();
  call.scale = arguments.value<std::optional<double>>();
  return call;
}

ForwardCall take_efficient_forward(Arguments& arguments) {
  ForwardCall call;
  call.op = kEfficientForward.name;
  call.peer = Peer::kEfficient;
  take_biased_sdpa(arguments, call);
  call.scale = arguments.value<std::optional<double>>();
  return call;
}

BackwardCall take_efficient_backward(Arguments& arguments) {
  BackwardCall call;
  call.op = kEfficientBackward.name;
  call.peer = Peer::kEfficient;
  call.order = DimOrder::kHeadsFirst;
  call.grad_out = arguments.tensor();
  take_qkv(arguments, call);
  call.attn_bias = arguments.tensor();
  call.out = arguments.tensor();
  call.logsumexp = arguments.tensor();
  call.cum_seq_q = undefined();
  call.cum_seq_k = undefined();
  call.rng_state = arguments.tensor();
  call.unused = arguments.tensor();
  call.dropout_p = arguments.value<double>();
  call.wanted = arguments.value<std::vector<bool>>();
  call.is_causal = arguments.value<bool>();
  call.scale = arguments.value<std::optional<double>>();
  return call;
}

ForwardCall take_attention(Arguments& arguments) {
  ForwardCall call;
  call.op = kAttention.name;
  call.is_own = true;
  call.is_low_level = true;
  call.order = DimOrder::kSequenceFirst;
  take_qkv(arguments, call);
  take_lengths(arguments, call);
  call.seqused_k = arguments.optional_tensor();
  call.block_table = arguments.optional_tensor();
  take_scale_and_mask(arguments, call);
  call.num_splits = arguments.value<int64_t>();
  call.has_block_table = torch_is_at_least(2, 12);
  arguments.value<bool>();  // deterministic, for the backward alone
  return call;
}

BackwardCall take_attention_backward(Arguments& arguments) {
  BackwardCall call;
  call.op = kAttentionBackward.name;
  call.is_low_level = true;
  call.order = DimOrder::kSequenceFirst;
  take_backward_tensors(arguments, call);
  take_lengths(arguments, call);
  call.cum_seq_q = or_undefined(std::move(call.cum_seq_q));
  call.cum_seq_k = or_undefined(std::move(call.cum_seq_k));
  take_scale_and_mask(arguments, call);
  call.deterministic = arguments.value<bool>();
  call.rng_state = undefined();
  call.unused = undefined();
  return call;
}

}  // namespace fa4::aten
