// Ours or the stock kernel's: the same decision for every op.
#pragma once

#include <optional>
#include <string>

#include "../core/plan/plan.h"

namespace fa4::aten {

// The plan of a described call; `reason`, when not empty, is why there can be none.
Plan choose(const Problem& problem, const std::string& reason, bool speed_rules);

// The same by the registration's options. Not supported: for the stock kernel, unless registration
// is strict; then it throws "FA4 <op> unsupported: <reason>".
Plan decide(const char* op, const Problem& problem, const std::string& reason);

// 1 / sqrt(head_dim) where the call gives none
float softmax_scale(std::optional<double> given, int64_t head_dim);

}  // namespace fa4::aten
