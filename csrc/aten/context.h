// Torch's global settings that the stable C interface does not show.
#pragma once

namespace fa4::aten {

// torch.use_deterministic_algorithms(True), and not warn_only: what the stock kernel goes by.
bool deterministic_algorithms();

// For a backward that adds up in any order: under torch.use_deterministic_algorithms(True,
// warn_only=True), once, as the stock kernel does.
void warn_of_nondeterminism();

}  // namespace fa4::aten
