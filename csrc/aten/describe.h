// From the arguments of an aten op to the Problem that core plans, or the reason why there is none.
#pragma once

#include <string>

#include "../core/launch/driver.h"
#include "../core/plan/problem.h"
#include "calls.h"

namespace fa4::aten {

struct ForwardDescription {
  Problem problem;
  std::string reason;  // not empty: our kernels can't take the call
  Target target;
  TensorInfo query, key, value;
};

struct BackwardDescription {
  Problem problem;
  std::string reason;
  Target target;
  TensorInfo grad_out, query, key, value, out, logsumexp;
};

// `simulated`: the device to describe the call for, whatever device the tensors are on; null: the
// tensors' own.
ForwardDescription describe(const ForwardCall& call, const Processors* simulated = nullptr);
BackwardDescription describe(const BackwardCall& call);

// [batch, heads, seqlen_q], or [heads, total_q] when ragged
struct LogsumexpShape {
  int64_t dim;
  int64_t size[3];
  int64_t elements() const { return size[0] * size[1] * (dim == 3 ? size[2] : 1); }
};

LogsumexpShape logsumexp_shape(const Problem& problem);

// The offsets that a described call of varlen layout came with; null when it is dense.
const int32_t* cu_seqlens(const Problem& problem, const Handle& cum_seq);

// Which inputs the kernels read from a copy, in words; empty when none. A tensor without memory
// goes by its offset in a storage.
std::string copies(const ForwardCall& call);

}  // namespace fa4::aten
