#include "speed_rules.h"

namespace fa4 {

const char* stock_is_faster(const Problem&, int, int) { return nullptr; }

}  // namespace fa4
