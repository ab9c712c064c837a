// torch.ops.fa4_ext.explain says what a call would get, for any tensors (meta too) and any device.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace fa4::aten {

// The op takes the arguments of _flash_attention_forward as torch 2.12 has them, then what to ask
// about them: `peer` says whose op the call comes in by, "flash", "cudnn" or "efficient", and `own`
// that it comes by torch.ops.fa4_ext.attention. attn_mask is the op's attn_bias. A capability of 0
// stands for query's own device.
inline constexpr const char* kExplainSchema =
    "explain(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "int max_q, int max_k, float dropout_p, bool is_causal, bool return_debug_mask, float? scale, "
    "int? window_size_left, int? window_size_right, Tensor? seqused_k, Tensor? alibi_slopes, "
    "Tensor? block_table, int? num_splits, bool deterministic, bool backward, bool speed_rules, "
    "int capability, int sm_count, str peer='flash', bool own=False, Tensor? attn_mask=None) "
    "-> (bool supported, str kernel, str reason, int tile_q, int tile_k, int workspace_bytes)";

void explain(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

}  // namespace fa4::aten
