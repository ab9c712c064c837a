#include "tile_schedule.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "../error.h"
#include "../integers.h"

namespace fa4 {
namespace {

constexpr int64_t kMostCursors = int64_t{1} << 30;
// From this many query heads per key/value head on, the planner also considers a schedule without
// pairs: in LPT order neighbouring CTAs read the same keys at the same time, so L2 need not keep
// them. In geometric mean this brings the choice 0.2% (4 heads) and 0.3% (8 heads) nearer to the
// fastest schedule; with 2 heads it would be 0.3% further away.
constexpr int64_t kManyShareKeys = 4;
// Above this many waves one tile more or less per CTA does not matter, and adding up the loads
// would take milliseconds.
constexpr int64_t kManyTiles = int64_t{1} << 16;
// What a tile costs beside its keys, in keys: of 740 problems, measured with up to 13 schedules
// each, the choice is 1.005 from the fastest in geometric mean with 128 to 192, 1.006 with 64 and
// 1.008 with none.
constexpr int64_t kTileCost = 128;

// The query tiles of a head: of a dense sequence, or at most of all packed sequences, each of which
// may fill its last one in part.
int64_t tiles_a_head(const Problem& p, const Kernel& kernel) {
  return p.layout == Layout::kVarlen ? bounded_sum(p.total_q / kernel.block_m, p.batch)
                                     : ceil_div(p.seqlen_q, kernel.block_m);
}

bool fits_cursors(const Problem& p, const Kernel& kernel) {
  const int64_t batch = p.layout == Layout::kVarlen ? 1 : p.batch;
  return bounded_product(batch, p.num_heads, tiles_a_head(p, kernel)) <= kMostCursors;
}

// A bias hides keys as it likes, so that its tiles are scheduled like those of a causal mask over
// as many keys as queries. kernels/sm90/tiles.py takes them in the same order.
bool in_causal_order(const Kernel& kernel) {
  return kernel.mask == Mask::kCausalBottomRight || kernel.mask == Mask::kBias;
}

Problem as_causal(const Problem& p, const Kernel& kernel) {
  Problem causal = p;
  if (kernel.mask == Mask::kBias) causal.seqlen_k = p.seqlen_q;
  return causal;
}

// The query tiles of a dense, causal problem and what they cost, in keys.
struct CausalTiles {
  const Problem& p;
  const Kernel& kernel;
  int64_t heads = p.batch * p.num_heads;
  int64_t a_head = tiles_a_head(p, kernel);
  int64_t units = ceil_div(a_head, 2);  // of a head: its pairs, and the tile that has no other

  int64_t cost(int64_t tile) const {
    const int64_t last_row = std::min((tile + 1) * kernel.block_m, p.seqlen_q);
    return std::max<int64_t>(last_row + p.seqlen_k - p.seqlen_q, 0) + kTileCost;
  }

  // A head's first unit holds its last rows and may cost less than the others, which all cost the
  // same. This is counted only if every CTA gets first units.
  int64_t busiest_with_pairs(const TileSchedule& schedule) const {
    const bool even = a_head % 2 == 0;
    const int64_t waves = ceil_div(schedule.paired_heads * units, schedule.num_ctas);
    const int64_t first = cost(a_head - 1) + (even ? cost(0) : 0);
    const int64_t other = units > 1 ? cost(a_head - 2) + cost(even ? 1 : 0) : first;
    const int64_t firsts = std::gcd<int64_t>(schedule.num_ctas, units) == 1 ? waves / units : 0;
    return firsts * first + (waves - firsts) * other;
  }

  // The tiles of unpaired heads go in LPT order, to and fro. The CTA with most of them is the
  // first, the middle one, the last, or the last that gets a tile more than the others.
  int64_t busiest(const TileSchedule& schedule) const {
    const int64_t num_ctas = schedule.num_ctas, rest = heads - schedule.paired_heads,
                  count = rest * a_head;
    int64_t most = 0;
    for (int64_t cta : {int64_t{0}, num_ctas / 2, num_ctas - 1, last_with_more(count, num_ctas)}) {
      int64_t load = 0;
      for (int64_t first = 0; first < count; first += 2 * num_ctas) {
        for (int64_t cursor : {first + cta, first + 2 * num_ctas - 1 - cta}) {
          if (cursor < count) load += cost(a_head - 1 - cursor / rest);
        }
      }
      most = std::max(most, load);
    }
    return busiest_with_pairs(schedule) + most;
  }

  static int64_t last_with_more(int64_t count, int64_t num_ctas) {
    const int64_t more = count % num_ctas;
    if (more == 0) return 0;
    return count / num_ctas % 2 == 0 ? more - 1 : num_ctas - more;
  }
};

// The most CTAs that share no factor with a head's units: round robin, each CTA gets some of every
// kind.
int32_t alternating(int64_t units, int32_t sm_count) {
  int32_t num_ctas = sm_count;
  while (std::gcd<int64_t>(num_ctas, units) != 1) --num_ctas;
  return num_ctas;
}

// The planner's choice for a dense, causal problem.
TileSchedule schedule_causal(const Problem& p, const Kernel& kernel, int32_t sm_count) {
  const CausalTiles tiles{p, kernel};
  const int64_t heads = tiles.heads, units = tiles.units;
  const auto leave = [&](int64_t waves) {
    return std::max<int64_t>(heads * units - waves * sm_count, 0) / units;
  };
  const int64_t even = sm_count / std::gcd<int64_t>(sm_count, units);
  const int64_t with_a_wave = leave(1) / even * even;
  const bool many_share_keys = p.num_heads >= kManyShareKeys * p.num_heads_kv;
  // Whole waves of pairs would leave more heads to LPT order than L2 holds keys of. Two waves in
  // LPT order are enough to balance what the pairs leave uneven.
  if (!many_share_keys && (heads - with_a_wave) * units > int64_t{3} * sm_count)
    return {sm_count, static_cast<int32_t>(leave(2))};
  const int64_t waves = ceil_div(heads * units, sm_count);
  if (many_share_keys && waves > kManyTiles) return {sm_count, 0};
  const auto with_load = [&](int64_t num_ctas, int64_t paired_heads) {
    const TileSchedule schedule{static_cast<int32_t>(num_ctas), static_cast<int32_t>(paired_heads)};
    return std::pair(tiles.busiest(schedule), schedule);
  };
  const auto all = with_load(ceil_div(heads * units, waves), heads);
  const auto alternate = with_load(alternating(units, sm_count), heads);
  const auto whole_waves = with_load(sm_count, leave(0) / even * even);
  const auto one_less = with_load(sm_count, with_a_wave);
  const auto none = many_share_keys ? with_load(sm_count, 0) : one_less;
  // If several schedules have the same load, this takes the first of them, which pairs the most
  // heads: unpaired tiles work on all of their heads at once, and miss L2.
  return std::min({all, alternate, whole_waves, one_less, none},
                  [](const auto& a, const auto& b) { return a.first < b.first; })
      .second;
}

// The CTAs for a dense problem without a mask. Where all tiles cost the same, it takes as few as
// need no more waves: the others would draw power in the waves before the last one. A head's last
// tile may have fewer rows and cost less: where the number of CTAs shares a factor with a head's
// tiles, some CTAs never get one, and the others wait for these; the fewest that share none and
// need no more waves even that out.
int32_t schedule_full(const Problem& p, const Kernel& kernel, int32_t sm_count) {
  const int64_t a_head = tiles_a_head(p, kernel), tiles = p.batch * p.num_heads * a_head;
  const int64_t waves = ceil_div(tiles, sm_count);
  if (p.seqlen_q % kernel.block_m == 0) return static_cast<int32_t>(ceil_div(tiles, waves));
  // Only the CTAs with one tile more than the others matter. If they are fewer than a head's tiles,
  // all of them may have a shorter last tile. Then all SMs run, as they also do if their number
  // shares no factor with a head's tiles.
  if (tiles % sm_count < a_head || std::gcd<int64_t>(sm_count, a_head) == 1) return sm_count;
  for (int64_t num_ctas = ceil_div(tiles, waves); num_ctas < sm_count; ++num_ctas) {
    if (std::gcd(num_ctas, a_head) == 1) return static_cast<int32_t>(num_ctas);
  }
  return sm_count;
}

}  // namespace

std::optional<std::string> schedule_tiles(const Problem& p, const Kernel& kernel,
                                          const TileSchedule& forced, TileSchedule& schedule) {
  if (!fits_cursors(p, kernel)) {
    return concat("there can be more than 2^30 tiles of queries: ", p.num_heads, " heads of ",
                  p.total_q, " queries in ", p.batch, " sequences");
  }
  const int32_t sm_count = std::max(p.sm_count, 1);
  schedule = {sm_count, 0};
  if (p.layout == Layout::kVarlen || kernel.mask == Mask::kWindow) return std::nullopt;
  const bool causal = in_causal_order(kernel);
  if (!forced) {
    schedule = causal ? schedule_causal(as_causal(p, kernel), kernel, sm_count)
                      : TileSchedule{schedule_full(p, kernel, sm_count), 0};
    return std::nullopt;
  }
  const int64_t heads = p.batch * p.num_heads;
  if (forced.num_ctas < 1 || forced.num_ctas > sm_count || forced.paired_heads < 0 ||
      forced.paired_heads > heads) {
    return concat("a schedule must have 1 to ", sm_count, " CTAs and 0 to ", heads,
                  " paired heads, has ", forced.num_ctas, " and ", forced.paired_heads);
  }
  schedule = {forced.num_ctas, causal ? forced.paired_heads : 0};
  return std::nullopt;
}

}  // namespace fa4
