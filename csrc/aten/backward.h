// The backward of every op.
#pragma once

#include "../core/plan/plan.h"
#include "describe.h"

namespace fa4::aten {

struct Gradients {
  Handle query, key, value;
};

// Computes the gradients of a planned call on our kernels.
Gradients compute_gradients(const BackwardCall& call, const BackwardDescription& d,
                            const Plan& plan);

// Puts the three gradients of a flash or cuDNN op on the stack. Our kernels compute them if they
// can, or else the peer does.
void backward(const BackwardCall& call, StableIValue* stack);

}  // namespace fa4::aten
