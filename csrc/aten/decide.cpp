#include "decide.h"

#include <cmath>

#include "../core/error.h"
#include "options.h"

namespace fa4::aten {

Plan choose(const Problem& problem, const std::string& reason, bool speed_rules) {
  if (reason.empty()) return plan(problem, speed_rules);
  Plan none;
  none.reason = reason;
  return none;
}

Plan decide(const char* op, const Problem& problem, const std::string& reason) {
  Plan result = choose(problem, reason, options().speed_rules.load(std::memory_order_relaxed));
  if (!result.supported() && options().strict.load(std::memory_order_relaxed))
    fail("FA4 ", op, " unsupported: ", result.reason);
  return result;
}

float softmax_scale(std::optional<double> given, int64_t head_dim) {
  return static_cast<float>(given.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))));
}

}  // namespace fa4::aten
