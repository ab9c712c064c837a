// Who ran the forward of a scaled_dot_product op, told to its backward by philox_seed. Without
// dropout nobody reads that number, but the backward gets it. So a backward runs where its forward
// ran, whatever the user has chosen since.
#pragma once

#include "tensors.h"

namespace fa4::aten {

// Returns a philox_seed that says that our kernels ran the forward.
Handle our_seed(int32_t device_index);
bool is_our_seed(AtenTensorHandle philox_seed);

}  // namespace fa4::aten
