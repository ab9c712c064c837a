#include "persistent.h"

#include <algorithm>
#include <numeric>

#include "integers.h"

namespace fa4 {
namespace {

constexpr int64_t kMostCursors = int64_t{1} << 30;

// A dense sequence's; of all packed sequences, which may each fill their last one in part, at most.
int64_t blocks_a_head(const Problem& p, const Kernel& kernel) {
  return p.layout == Layout::kVarlen ? p.total_q / kernel.block_m + p.batch : ceil_div(p.seqlen_q, kernel.block_m);
}

}  // namespace

bool fits_cursors(const Problem& p, const Kernel& kernel) {
  return (p.layout == Layout::kVarlen ? 1 : p.batch) * p.num_heads <= kMostCursors / blocks_a_head(p, kernel);
}

// Pairs cost the same, so whole rounds of them leave all workers equal. The rest is dealt out longest first, which needs a round or
// more to make up for its own differences, and up to four are few enough heads for L2. Where no number of heads makes whole rounds,
// two are left. tests/test_tiles.py holds what that leaves idle.
int32_t paired_heads(const Problem& p, const Kernel& kernel, int32_t workers) {
  const int64_t heads = p.batch * p.num_heads, units = ceil_div(blocks_a_head(p, kernel), 2);
  const auto leave = [&](int64_t rounds) { return std::max<int64_t>(heads * units - rounds * workers, 0) / units; };
  const int64_t even = workers / std::gcd<int64_t>(workers, units);
  int64_t paired = leave(1) / even * even;
  if ((heads - paired) * units > 4 * workers) paired = leave(2);
  return static_cast<int32_t>(paired);
}

}  // namespace fa4
