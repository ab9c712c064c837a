// Turns the arguments of an aten op into the Problem that core plans, or into the reason why there
// is none. A description follows from the call and from the device that it is for, and from nothing
// else.
#pragma once

#include <optional>
#include <string>

#include "../core/launch/driver.h"
#include "../core/plan/problem.h"
#include "calls.h"

namespace fa4::aten {

struct Description {
  Problem problem;
  std::optional<std::string> reason;  // why our kernels can't take the call
  Target target;
  TensorInfo query, key, value;
  std::optional<TensorInfo> bias;
};

using ForwardDescription = Description;

struct BackwardDescription : Description {
  TensorInfo grad_out, out, logsumexp;
};

// Describes the call for the device `simulated`; if that is null, for the tensors' own.
ForwardDescription describe(const ForwardCall& call, const Processors* simulated = nullptr);
BackwardDescription describe(const BackwardCall& call);

// [batch, heads, lse_rows], which the cuDNN op follows by a 1, or [heads, total_q] when ragged
struct LogsumexpShape {
  int64_t dim;
  int64_t size[4];
};

LogsumexpShape logsumexp_shape(const Problem& problem);

// Cuts keys, values or their gradients to the problem's seqlen_k.
TensorView seen_keys(TensorView keys, const Problem& problem);

// The offsets that a described call of varlen layout came with; null when it is dense.
const int32_t* cu_seqlens(const Problem& problem, const Handle& cum_seq);

// The names of query, key and value where the kernels read them from a copy; none where they read
// all in place. A tensor without memory goes by its offset in a storage.
std::optional<std::string> copied_inputs(const ForwardCall& call);

// The same of the bias of a supported call.
bool bias_is_copied(const ForwardCall& call, const ForwardDescription& description);

}  // namespace fa4::aten
