#include "decide.h"

#include <cmath>

#include "../core/error.h"
#include "options.h"

namespace fa4::aten {

Plan choose(const Description& call, bool speed_rules) {
  if (!call.reason)
    return plan(call.problem, speed_rules, overrides(), kTileRules, disabled_kernels());
  Plan none;
  none.reason = call.reason;
  return none;
}

Plan decide(const char* op, const Description& call, bool must_be_ours) {
  const bool speed_rules = !must_be_ours && options().speed_rules.load(std::memory_order_relaxed);
  Plan result = choose(call, speed_rules);
  if (!result.supported() && options().strict.load(std::memory_order_relaxed))
    fail("FA4 ", op, " unsupported: ", *result.reason);
  return result;
}

PlannedForward plan_forward(const ForwardCall& call) {
  PlannedForward planned{describe(call), {}};
  planned.plan = decide(call.op, planned.d);
  return planned;
}

float softmax_scale(std::optional<double> given, int64_t head_dim) {
  return static_cast<float>(given.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))));
}

}  // namespace fa4::aten
