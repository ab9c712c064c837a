// The arguments of the ops are taken off the boxed stack here. Optional tensors that were not
// given are empty handles.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "tensors.h"

namespace fa4::aten {

// Describes an op as the known versions of torch declare it.
struct KnownOp {
  const char* name;
  // The number of arguments in the oldest known torch comes first, then that in the newest.
  uint64_t inputs[2];
  uint64_t outputs;
};

inline constexpr KnownOp kSdpaForward{"_scaled_dot_product_flash_attention", {7, 7}, 9};
inline constexpr KnownOp kSdpaBackward{"_scaled_dot_product_flash_attention_backward", {15, 15}, 3};
// torch 2.12 added block_table and num_splits.
inline constexpr KnownOp kFlashForward{"_flash_attention_forward", {15, 17}, 5};
inline constexpr KnownOp kFlashForwardInplace{
    "_flash_attention_forward_no_dropout_inplace", {18, 18}, 1};
inline constexpr KnownOp kFlashBackward{"_flash_attention_backward", {17, 17}, 3};
inline constexpr KnownOp kCudnnSdpaForward{"_scaled_dot_product_cudnn_attention", {9, 9}, 9};
inline constexpr KnownOp kCudnnSdpaBackward{
    "_scaled_dot_product_cudnn_attention_backward", {16, 16}, 3};
// torch 2.14 added seqused_k and block_table.
inline constexpr KnownOp kCudnnForward{"_cudnn_attention_forward", {13, 15}, 9};
// torch 2.15 added it.
inline constexpr KnownOp kCudnnForwardInplace{
    "_cudnn_attention_forward_no_dropout_inplace", {12, 12}, 1};
inline constexpr KnownOp kCudnnBackward{"_cudnn_attention_backward", {16, 16}, 3};

inline constexpr KnownOp kEfficientForward{"_scaled_dot_product_efficient_attention", {8, 8}, 4};
inline constexpr KnownOp kEfficientBackward{
    "_scaled_dot_product_efficient_attention_backward", {13, 13}, 4};

// Our own ops.
inline constexpr KnownOp kAttention{"attention", {15, 15}, 2};
inline constexpr KnownOp kAttentionBackward{"attention_backward", {15, 15}, 3};

struct ForwardCall {
  const char* op;
  // Whose op was called, and runs the call if our kernels do not.
  Peer peer = Peer::kFlash;
  DimOrder order;
  // Only the in-place op has it.
  Handle out;
  Handle query, key, value;
  Handle cum_seq_q, cum_seq_k;
  int64_t max_q = 0, max_k = 0;
  double dropout_p = 0;
  bool is_causal = false;
  bool return_debug_mask = false;
  std::optional<double> scale;
  std::optional<int64_t> window_size_left, window_size_right;
  Handle seqused_k, alibi_slopes;
  // The flash ops lack these two.
  Handle attn_bias;
  bool compute_log_sumexp = true;
  // block_table and num_splits exist since torch 2.12.
  Handle block_table;
  std::optional<int64_t> num_splits;
  // Says which of a family's ops was called: _scaled_dot_product_... or the one below it.
  bool is_low_level = false;
  // Says which schema of a low-level forward was called: with block_table, or the older one.
  bool has_block_table = false;
  // The call is of torch.ops.fa4_ext.attention, which takes seqused_k with dense tensors, too.
  bool is_own = false;
};

struct BackwardCall {
  const char* op;
  bool is_low_level = false;
  Peer peer = Peer::kFlash;
  DimOrder order;
  Handle grad_out, query, key, value, out, logsumexp;
  // Both are undefined tensors in a dense call.
  Handle cum_seq_q, cum_seq_k;
  int64_t max_q = 0, max_k = 0;
  double dropout_p = 0;
  bool is_causal = false;
  // The cuDNN and memory-efficient ops call them philox_seed and philox_offset.
  Handle rng_state, unused;
  std::optional<double> scale;
  std::optional<int64_t> window_size_left, window_size_right;
  // The flash ops lack it; an undefined tensor where there is none.
  Handle attn_bias;
  // Which gradients the caller wants: of query, key, value and attn_bias. Only the memory-efficient
  // op has it.
  std::vector<bool> wanted;
  // Only our own op has it: the caller wants the same bits in every run, whatever torch's setting.
  bool deterministic = false;
};

[[noreturn]] void refuse(const KnownOp& op, uint64_t num_inputs, uint64_t num_outputs);

// Reads a stack from the bottom. Whoever takes an argument owns it.
class Arguments {
 public:
  // Throws an Error where torch has a number of arguments or results that is not known, because
  // they would be read as something else. The tensors among them leak, because nothing tells which
  // ones these are.
  Arguments(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs, const KnownOp& op)
      : next_(stack) {
    const bool known = num_inputs == op.inputs[0] || num_inputs == op.inputs[1];
    if (!known || num_outputs != op.outputs) refuse(op, num_inputs, num_outputs);
  }

  Handle tensor() { return Handle(torch::stable::detail::to<AtenTensorHandle>(*next_++)); }

  Handle optional_tensor() {
    Handle given(
        torch::stable::detail::to<std::optional<AtenTensorHandle>>(*next_++).value_or(nullptr));
    return given && defined(given.get()) ? std::move(given) : Handle();
  }

  template <class T>
  T value() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  StableIValue* next_;
};

ForwardCall take_sdpa_forward(Arguments& arguments);
// `has_block_table` says that the stack has the 17 arguments of torch 2.12 and later, not 15.
ForwardCall take_flash_forward(Arguments& arguments, bool has_block_table);
ForwardCall take_flash_forward_inplace(Arguments& arguments);
// The two backward ops differ in the order of dimensions and in the window, which the
// scaled_dot_product op lacks.
BackwardCall take_backward(Arguments& arguments, const KnownOp& op, DimOrder order);

ForwardCall take_cudnn_sdpa_forward(Arguments& arguments);
// `has_block_table` says that the stack has the 15 arguments of torch 2.14 and later, not 13.
// Without cum_seq_q the low-level ops take dense tensors, heads first.
ForwardCall take_cudnn_forward(Arguments& arguments, bool has_block_table);
ForwardCall take_cudnn_forward_inplace(Arguments& arguments);
// Both backward ops have the same arguments.
BackwardCall take_cudnn_backward(Arguments& arguments, const KnownOp& op);

ForwardCall take_efficient_forward(Arguments& arguments);
BackwardCall take_efficient_backward(Arguments& arguments);

ForwardCall take_attention(Arguments& arguments);
BackwardCall take_attention_backward(Arguments& arguments);

inline StableIValue give(Handle handle) { return torch::stable::detail::from(handle.release()); }

}  // namespace fa4::aten
