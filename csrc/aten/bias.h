// The attn_bias of an op: a tensor that is added to the scores, [queries, keys] or [batch,
// heads, queries, keys]. A dimension of one index, or with a stride of 0, is broadcast.
#pragma once

#include <optional>
#include <string>

#include "inputs.h"

namespace fa4::aten {

// These two are steps of check_tensors and fill_problem. What else a call asks for beside a bias,
// such as packed sequences, is left to the planner.
std::optional<std::string> check_bias(const Inputs& inputs);
void fill_bias(const Inputs& inputs, Problem& problem);

// Whether the kernels read the bias where it lies. `byte_offset`: its address, or its offset where
// there is no memory.
bool bias_is_readable(const TensorInfo& bias, const Problem& problem, int64_t byte_offset);

// Why the kernels do not run a backward that asks for it.
inline constexpr const char* kNoGradientOfBias = "no kernel computes the gradient of attn_bias";

// Holds a problem's bias as the kernels can read it: the tensor itself, or a copy that lives as
// long as this object. Without a bias it holds nothing.
struct ReadableBias {
  Handle copy;
  BiasView view;

  ReadableBias(const Handle& bias, const std::optional<TensorInfo>& info, const Problem& problem);
};

}  // namespace fa4::aten
