#include "bias.h"

#include <algorithm>

#include "../core/error.h"
#include "../core/integers.h"
#include "strides.h"

namespace fa4::aten {
namespace {

constexpr int kDims = 4;
constexpr int kQueries = 2, kKeys = 3;
// A copy's rows begin at multiples of so many elements. A quarter warp's pairs of a row then lie in
// one sector of 32 bytes.
constexpr int64_t kRowAlign = kTmaBytes / kElementBytes;

// What of a bias differs from index to index: [batch, heads, queries, keys], where what is
// broadcast has one index.
struct Distinct {
  int64_t size[kDims] = {1, 1, 1, 1};
  int64_t stride[kDims] = {0, 0, 0, 1};

  explicit Distinct(const TensorInfo& bias) {
    const int64_t absent = kDims - bias.dim;
    for (int64_t d = absent; d < kDims; ++d) {
      const int64_t given = bias.size[d - absent], step = bias.stride[d - absent];
      if (given == 1 || (step == 0 && given > 1)) continue;
      size[d] = given;
      stride[d] = step;
    }
  }
};

// With an odd number of keys, the last pair of the last row may end behind the tensor.
bool is_readable(const Distinct& bias, int64_t keys, int64_t byte_offset) {
  return keys % 2 == 0 && bias.size[kKeys] == keys &&
         can_read_pairs(kDims, bias.size, bias.stride, byte_offset);
}

// Returns a copy of what differs. The keys are as many as the problem has, even if they were
// broadcast, and behind them a row is padded.
Handle padded_copy(AtenTensorHandle bias, const TensorInfo& given, const Distinct& distinct,
                   int64_t keys) {
  int64_t size[kDims];
  std::copy_n(distinct.size, kDims, size);
  size[kKeys] = round_up(keys, kRowAlign);
  const Handle padded = empty(kDims, size, given.dtype, given.device_index);
  Handle rows = narrow(padded.get(), kKeys, 0, keys);
  const Handle from = reinterpret(bias, kDims, distinct.size, distinct.stride);
  copy(rows.get(), from.get(), "copying attn_bias");
  return rows;
}

// Lays the queries that are broadcast over all of the problem's.
BiasView view_of(AtenTensorHandle bias, const Distinct& distinct, const Problem& p) {
  BiasView view;
  view.data = data(bias);
  std::copy_n(distinct.size, kDims, view.size);
  std::copy_n(distinct.stride, kDims, view.stride);
  view.size[kQueries] = p.seqlen_q;
  return view;
}

}  // namespace

std::optional<std::string> check_bias(const Inputs& in) {
  if (!in.bias || in.varlen()) return std::nullopt;
  const TensorInfo& bias = *in.bias;
  if (!same_device(bias, in.q)) return "attn_bias must be on query's device";
  if (bias.dtype != in.q.dtype)
    return "attn_bias must have query's dtype, which a bool attn_mask gets first";
  if (bias.dim != 2 && bias.dim != kDims)
    return concat("attn_bias must be 2D or 4D, is ", bias.dim, "D");
  const int64_t heads = in.order == DimOrder::kHeadsFirst ? 1 : 2, rows = 3 - heads;
  const int64_t full[] = {in.q.size[0], in.q.size[heads], in.q.size[rows], in.k.size[rows]};
  for (int64_t d = 0; d < bias.dim; ++d) {
    const int64_t whole = full[d + kDims - bias.dim];
    if (bias.size[d] != 1 && bias.size[d] != whole) {
      return concat("attn_bias must have 1 or ", whole, " indices in dimension ", d - bias.dim,
                    ", has ", bias.size[d]);
    }
  }
  return std::nullopt;
}

void fill_bias(const Inputs& in, Problem& p) {
  p.bias = in.bias.has_value();
  if (!p.bias || in.varlen()) return;
  const Distinct distinct(*in.bias);
  p.bias_batch = distinct.size[0];
  p.bias_heads = distinct.size[1];
  p.bias_by_query = distinct.size[kQueries] > 1;
  const bool in_rows = distinct.size[kKeys] == p.seqlen_k && distinct.stride[kKeys] == 1;
  p.bias_suits_cudnn = in_rows && in.bias_offset % kTmaBytes == 0;
}

bool bias_is_readable(const TensorInfo& bias, const Problem& p, int64_t byte_offset) {
  return is_readable(Distinct(bias), p.seqlen_k, byte_offset);
}

ReadableBias::ReadableBias(const Handle& bias, const std::optional<TensorInfo>& given,
                           const Problem& p) {
  if (!given) return;
  const Distinct distinct(*given);
  if (is_readable(distinct, p.seqlen_k, reinterpret_cast<int64_t>(data(bias.get())))) {
    view = view_of(bias.get(), distinct, p);
  } else {
    copy = padded_copy(bias.get(), *given, distinct, p.seqlen_k);
    view = view_of(copy.get(), Distinct(info(copy.get())), p);
  }
}

}  // namespace fa4::aten
