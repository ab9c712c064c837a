// Torch's global settings that the stable C interface does not show.
#pragma once

namespace fa4::aten {

// torch.use_deterministic_algorithms(True), and not warn_only: what the stock kernel goes by.
bool deterministic_algorithms();

}  // namespace fa4::aten
