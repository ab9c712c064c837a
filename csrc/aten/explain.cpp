// torch.ops.fa4_ext.explain: what a call would get, for any tensors (meta too) and any device.
#include <torch/csrc/stable/library.h>

#include <string>

#include "decide.h"
#include "describe.h"

namespace fa4::aten {
namespace {

// The arguments of _flash_attention_forward as torch 2.12 has them, then what to ask about them. capability 0: query's own device.
constexpr const char* kSchema =
    "explain(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, int max_q, int max_k, "
    "float dropout_p, bool is_causal, bool return_debug_mask, float? scale, int? window_size_left, int? window_size_right, "
    "Tensor? seqused_k, Tensor? alibi_slopes, Tensor? block_table, int? num_splits, "
    "bool deterministic, bool backward, bool speed_rules, int capability, int sm_count) -> (bool supported, str kernel, str "
    "reason, int tile_q, int tile_k, int workspace_bytes)";

void explain(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ForwardCall call = take_flash_forward(arguments, true);
  const bool deterministic = arguments.value<bool>(), backward = arguments.value<bool>(), speed_rules = arguments.value<bool>();
  const auto capability = arguments.value<int64_t>(), sm_count = arguments.value<int64_t>();
  const Processors device{static_cast<int32_t>(capability), static_cast<int32_t>(sm_count), true};
  ForwardDescription d = describe(call, capability ? &device : nullptr);
  d.problem.op = backward ? Op::kBackward : Op::kForward;
  d.problem.deterministic = backward && deterministic;
  const Plan chosen = choose(d.problem, d.reason, speed_rules);
  stack[0] = torch::stable::detail::from(chosen.supported());
  stack[1] = torch::stable::detail::from(std::string(chosen.name()));
  stack[2] = torch::stable::detail::from(chosen.supported() ? copies(call) : chosen.reason);
  stack[3] = torch::stable::detail::from(chosen.tile_q());
  stack[4] = torch::stable::detail::from(chosen.tile_k());
  stack[5] = torch::stable::detail::from(chosen.supported() ? chosen.workspace.bytes : int64_t{0});
}

STABLE_TORCH_LIBRARY(fa4_ext, library) { library.def(kSchema); }

STABLE_TORCH_LIBRARY_IMPL(fa4_ext, CompositeExplicitAutograd, library) { library.impl("explain", &explain); }

}  // namespace
}  // namespace fa4::aten
