// Runs planned forwards on our kernels. Each family of ops returns the results in its own way.
#pragma once

#include "describe.h"

namespace fa4::aten {

// Holds the memory of a plan's workspace.
class WorkspaceMemory {
 public:
  // Takes `spare`, of `spare_bytes`, where that is large enough. It must outlive this object.
  WorkspaceMemory(const Plan& plan, int32_t device, const Handle& spare = {},
                  int64_t spare_bytes = 0);

  void* data() const { return data_; }

 private:
  Handle own_;
  void* data_ = nullptr;
};

Handle empty_logsumexp(const ForwardDescription& d);

// Computes attention into `out_tensor`, of which `out` is a view, and into `logsumexp`, which
// empty_logsumexp() made.
void forward(const ForwardCall& call, const ForwardDescription& d, const Plan& plan,
             AtenTensorHandle out_tensor, const TensorView& out, const Handle& logsumexp,
             const WorkspaceMemory& workspace);

// Does the same for the in-place ops and returns the logsumexp.
Handle forward_inplace(const ForwardCall& call, const ForwardDescription& d, const Plan& plan);

}  // namespace fa4::aten
