// Makes the same decision for every op: our kernel or the stock one.
#pragma once

#include <optional>

#include "../core/plan/plan.h"
#include "describe.h"

namespace fa4::aten {

// The plan of a described call.
Plan choose(const Description& call, bool speed_rules);

// Plans by the registration's options. Where the call is not supported, the stock kernel is to
// run it, unless registration is strict: then this throws "FA4 <op> unsupported: <reason>". With
// `must_be_ours` no speed rule leaves the call to the stock kernel.
Plan decide(const char* op, const Description& call, bool must_be_ours = false);

struct PlannedForward {
  ForwardDescription d;
  Plan plan;

  // Returns whether our kernels run the call.
  explicit operator bool() const { return plan.supported(); }
};

// Describes a forward call and decides on it.
PlannedForward plan_forward(const ForwardCall& call);

// Defaults to 1 / sqrt(head_dim).
float softmax_scale(std::optional<double> given, int64_t head_dim);

}  // namespace fa4::aten
