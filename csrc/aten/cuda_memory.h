// Allocates CUDA tensors without passing through torch's dispatcher, as Inductor's generated code
// does. A flash forward allocates five, which took a third of its time on the host. torch's C++
// function is looked up under the mangled name that holds its parameters' types (torch_errors.h
// says how these are passed). Where a torch lacks it, the caller goes through the stable interface,
// which does the same but takes longer.
#pragma once

#include "tensors.h"

namespace fa4::aten {

// Returns an uninitialised tensor, or an empty handle where this torch has no such function. Raises
// torch's own errors.
Handle empty_cuda(int64_t dim, const int64_t* size, const int64_t* stride, int32_t dtype,
                  int32_t device_index);

}  // namespace fa4::aten
