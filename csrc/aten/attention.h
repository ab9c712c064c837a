// torch.ops.fa4_ext.attention and its backward: attention for programs that ask for this library by
// name. PyTorch's own ops cannot say how many keys of a dense cache are in use.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace fa4::aten {

// q is [batch, seqlen_q, heads, head_dim], or with cu_seqlens_q [total_q, heads, head_dim]; k and v
// likewise, or with block_table pages. A causal mask is aligned bottom-right, and a window bound of
// -1 masks nothing. fa4_ext/flash_attn/_ops.py has the fake and the autograd implementation.
inline constexpr const char* kAttentionSchema =
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? seqused_k, Tensor? block_table, "
    "float? softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right, "
    "int num_splits, bool deterministic) -> (Tensor out, Tensor softmax_lse)";

inline constexpr const char* kAttentionBackwardSchema =
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float? softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)";

void attention(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);
void attention_backward(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

}  // namespace fa4::aten
