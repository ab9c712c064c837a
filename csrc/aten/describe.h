// From the arguments of an aten op to the Problem that core plans, or the reason why there is none.
#pragma once

#include <string>

#include "../core/problem.h"
#include "calls.h"

namespace fa4::aten {

// The device that a call would run on: the tensors' own, or one that explain() is asked about.
struct DeviceFacts {
  int32_t capability;
  int32_t sm_count;
  bool simulated;  // the tensors need not be on a GPU
};

struct ForwardDescription {
  Problem problem;
  std::string reason;  // not empty: our kernels can't take the call
  TensorInfo query, key, value;
};

struct BackwardDescription {
  Problem problem;
  std::string reason;
  TensorInfo grad_out, query, key, value, out, logsumexp;
};

ForwardDescription describe(const ForwardCall& call, const DeviceFacts* simulated = nullptr);
BackwardDescription describe(const BackwardCall& call);

// Which inputs the kernels read from a copy, in words; empty when none. Goes by offsets in storages, which are aligned, so that it
// works without memory too.
std::string copies(const ForwardCall& call);

}  // namespace fa4::aten
