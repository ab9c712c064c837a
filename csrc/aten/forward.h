// Runs planned forwards on our kernels. Each family of ops returns the results in its own way.
#pragma once

#include "decide.h"

namespace fa4::aten {

// Each output has memory of its own, as the schemas promise: code that wraps an op, saves its
// results or frees them one by one relies on that.
struct ForwardOutputs {
  Handle out, logsumexp;
  // A number of 64 bits that the flash ops call `unused` and the others philox_offset. Without
  // dropout nobody reads it, and the stock kernels leave it uninitialised too.
  Handle number;
};

ForwardOutputs forward(const ForwardCall& call, const PlannedForward& planned,
                       int32_t dtype_of_number);

// Writes the output of an in-place op and returns the logsumexp.
Handle forward_inplace(const ForwardCall& call, const PlannedForward& planned);

}  // namespace fa4::aten
