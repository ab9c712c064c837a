// Makes the same decision for every op: our kernel or the stock one.
#pragma once

#include <optional>

#include "../core/plan/plan.h"
#include "describe.h"

namespace fa4::aten {

// The plan of a described call.
Plan choose(const Description& call, bool speed_rules);

// Plans by the registration's options. Where the call is not supported, the stock kernel is to
// run it, unless registration is strict: then this throws "FA4 <op> unsupported: <reason>".
Plan decide(const char* op, const Description& call);

// Defaults to 1 / sqrt(head_dim).
float softmax_scale(std::optional<double> given, int64_t head_dim);

}  // namespace fa4::aten
