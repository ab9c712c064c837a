#include "decide.h"

#include <cmath>

#include "../core/error.h"
#include "options.h"

namespace fa4::aten {

Plan decide(const char* op, const Problem& problem, const std::string& reason) {
  Plan result;
  if (reason.empty()) {
    result = plan(problem, options().speed_rules.load(std::memory_order_relaxed));
  } else {
    result.reason = reason;
  }
  if (!result.supported() && options().strict.load(std::memory_order_relaxed)) fail("FA4 ", op, " unsupported: ", result.reason);
  return result;
}

float softmax_scale(std::optional<double> given, int64_t head_dim) {
  return static_cast<float>(given.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))));
}

}  // namespace fa4::aten
