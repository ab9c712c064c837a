// Reads torch's global settings that the stable C interface does not show.
#pragma once

namespace fa4::aten {

// Returns whether torch.use_deterministic_algorithms(True) is in force without warn_only. The stock
// kernel follows the same setting.
bool deterministic_algorithms();

// Warns before a backward that adds up in any order, once, under
// torch.use_deterministic_algorithms(True, warn_only=True), as the stock kernel does.
void warn_of_nondeterminism();

}  // namespace fa4::aten
