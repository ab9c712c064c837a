#include "decode_choice.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "../error.h"
#include "../integers.h"
#include "choose_kernel.h"

namespace fa4 {
namespace {

const std::vector<const Kernel*>& decode_kernels() {  // smallest bucket and tile first
  static const auto* found = [] {
    auto* kernels = new std::vector<const Kernel*>;
    for (const Kernel* k = kKernels; k != kKernels + kNumKernels; ++k) {
      if (k->op == Op::kDecode) kernels->push_back(k);
    }
    std::sort(kernels->begin(), kernels->end(), [](const Kernel* a, const Kernel* b) {
      return std::tie(a->arch, a->head_dim, a->head_dim_v, a->block_m) <
             std::tie(b->arch, b->head_dim, b->head_dim_v, b->block_m);
    });
    return kernels;
  }();
  return *found;
}

// Whether a page holds whole key blocks of the kernel. Where it does not, TMA brings them in
// smaller boxes.
bool reads_whole_blocks(const Kernel& kernel, const Problem& p) {
  return p.page_size % kernel.block_n == 0;
}

// With one split of pages the decode kernel runs any number of queries: the caller asks for a
// result that does not depend on the rest of the batch, and so not on its longest sequence either.
bool one_split_of_pages(const Problem& p) { return p.page_size && p.num_splits == 1; }

bool has_few_queries(const Problem& p) {
  return p.seqlen_q <= kMaxDecodeQueries && decode_rows(p) <= kMaxDecodeRows;
}

// With one split no tile is small enough, so that the largest runs always: the caller asks for a
// result that does not depend on the rest of the batch.
bool holds_all_rows(const Kernel& kernel, const Problem& p) {
  return kernel.block_m >= decode_rows(p) && p.num_splits != 1;
}

// Takes the smallest bucket that holds both head dims. Of its tiles it takes the smallest that
// holds all rows, or else the largest, and where the key blocks of some divide a page, one of
// these. Null where the build has none.
const Kernel* find_decode(const Problem& p, const KernelSet& disabled) {
  const int arch = kernel_arch(p.capability);
  const Kernel* found = nullptr;
  for (const Kernel* kernel : decode_kernels()) {
    if (kernel->arch != arch || kernel->dtype != p.dtype || kernel->head_dim < p.head_dim ||
        kernel->head_dim_v < p.head_dim_v || disabled.contains(*kernel)) {
      continue;
    }
    if (found && std::tie(kernel->head_dim, kernel->head_dim_v) !=
                     std::tie(found->head_dim, found->head_dim_v))
      break;
    const bool whole = reads_whole_blocks(*kernel, p);
    const bool better =
        !found || (whole == reads_whole_blocks(*found, p) ? !holds_all_rows(*found, p) : whole);
    if (better) found = kernel;
  }
  return found;
}

// The tiles of a sequence, of all heads.
int64_t decode_tiles(const Problem& p, const Kernel& kernel) {
  return bounded_product(p.num_heads_kv, ceil_div(decode_rows(p), kernel.block_m));
}

// The keys that the queries of a sequence see, at most.
int64_t visible_keys(const Problem& p, const ResolvedMask& mask) {
  return std::min(p.seqlen_k, bounded_sum(int64_t{mask.left} + mask.right, p.seqlen_q));
}

// The most tiles of `tile` rows that all sequences fill with `rows` rows per query. Packed
// sequences may be shorter than the longest, and their last tiles may be partly filled.
int64_t tiles_in_all(const Problem& p, int64_t rows, int64_t tile) {
  return std::min(bounded_product(p.batch, ceil_div(bounded_product(p.seqlen_q, rows), tile)),
                  bounded_sum(bounded_product(p.total_q, rows) / tile, p.batch));
}

// Estimated times, in units of a tile's time for 64 keys. A decode CTA takes 10 units to start and
// combine, a forward tile half a unit to start, and the memset for packed sequences 2. These are
// fitted to 2,512 problems of 1 to 128 queries on an H200: in geometric mean either kernel alone
// takes 1.3 times as long as the better of the two, this choice 1.02 times.
constexpr int64_t kKeys = 64;
constexpr double kDecodeStart = 10, kTileStart = 0.5, kMemset = 2;

double decode_cost(const Problem& p, const ResolvedMask& mask, const Kernel& kernel) {
  const int64_t splits = decode_splits(p, mask, kernel),
                at_a_time = sm_count(p) * kernel.ctas_per_sm;
  const int64_t tiles = tiles_in_all(p, p.num_heads / p.num_heads_kv, kernel.block_m);
  const int64_t ctas = bounded_product(splits, p.num_heads_kv, tiles);
  const double waves = std::max(static_cast<double>(ctas) / static_cast<double>(at_a_time), 1.0);
  return waves *
         (kDecodeStart + static_cast<double>(ceil_div(visible_keys(p, mask), kKeys * splits)));
}

double forward_cost(const Problem& p, const ResolvedMask& mask, const Kernel& kernel) {
  const int64_t waves =
      ceil_div(bounded_product(p.num_heads, tiles_in_all(p, 1, kernel.block_m)), sm_count(p));
  const double a_tile = kTileStart + static_cast<double>(ceil_div(visible_keys(p, mask), kKeys));
  return static_cast<double>(waves) * a_tile + (p.layout == Layout::kVarlen ? kMemset : 0);
}

}  // namespace

int64_t decode_rows(const Problem& p) {
  return bounded_product(p.seqlen_q, p.num_heads / p.num_heads_kv);
}

const Kernel* choose_decode(const Problem& p, const ResolvedMask& mask, const Kernel* forward,
                            Decode where, const KernelSet& disabled) {
  const Kernel* kernel = find_decode(p, disabled);
  const bool one_split = one_split_of_pages(p);
  if (!kernel || decode_tiles(p, *kernel) > kMaxGrid || !(one_split || has_few_queries(p)))
    return nullptr;
  if (!forward || one_split || p.keys_in_use || p.num_splits > 1 || where == Decode::kWherePossible)
    return kernel;  // the forward can't, or shall not
  // With one split the caller asks for a result that does not depend on the rest of the batch,
  // which decides what pays.
  if (p.num_splits == 1 || where == Decode::kWhereNeeded) return nullptr;
  // The costs were measured on Hopper. On Blackwell the products of this kernel are slower than the
  // forward's, and only where one tile has all rows is it sure to wait for keys, not for them.
  if (kernel->arch == 100 && decode_rows(p) > kernel->block_m) return nullptr;
  return decode_cost(p, mask, *kernel) < forward_cost(p, mask, *forward) ? kernel : nullptr;
}

std::string decode_limit(const Problem& p, const Kernel& kernel, const Overrides& overrides,
                         const KernelSet& disabled) {
  if (p.op == Op::kBackward) return "only in a forward";
  if (overrides.tile) return "only without a forced tile";
  const auto at_most = [](int64_t bound, const char* what, int64_t here) {
    return concat("for at most ", bound, " ", what, ", here ", here);
  };
  if (p.seqlen_q > kMaxDecodeQueries) return at_most(kMaxDecodeQueries, "queries", p.seqlen_q);
  if (decode_rows(p) > kMaxDecodeRows) {
    return at_most(kMaxDecodeRows, "queries times query heads of a key/value head", decode_rows(p));
  }
  const Kernel* decode = find_decode(p, disabled);
  if (!decode) return "only by decode kernels, of which this build has none for it";
  return at_most(kMaxGrid, "tiles of queries and heads in a sequence", decode_tiles(p, *decode));
}

// Returns the caller's number of splits, or else as many as give every SM about one CTA. While
// there are fewer tiles than SMs, these are at least ctas_per_sm (two CTAs share an SM only in
// clusters of two: larger ones were measured not to pack). With the planner's number every CTA has
// at least one key block.
int32_t decode_splits(const Problem& p, const ResolvedMask& mask, const Kernel& kernel) {
  // A cluster has at most this many CTAs. One of 16 needs 16 SMs in one GPC, which smaller GPUs may
  // lack.
  const int64_t sms = sm_count(p), most = sms >= 132 ? 16 : 8;
  if (p.num_splits > 0) return static_cast<int32_t>(std::min(p.num_splits, most));
  const int64_t tiles = bounded_product(p.batch, decode_tiles(p, kernel));
  const int64_t fill = tiles < sms ? std::max<int64_t>(kernel.ctas_per_sm, sms / tiles) : 1;
  return static_cast<int32_t>(
      std::min({most, fill, ceil_div(visible_keys(p, mask), kernel.block_n)}));
}

}  // namespace fa4
