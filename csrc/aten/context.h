// Reads torch's global settings that the stable C interface does not show.
#pragma once

namespace fa4::aten {

// Returns whether torch.use_deterministic_algorithms(True) is in force without warn_only. The stock
// kernel follows the same setting.
bool deterministic_algorithms();

// Warns before a backward that adds up in any order, once, under
// torch.use_deterministic_algorithms(True, warn_only=True), as the stock kernel does.
void warn_of_nondeterminism();

// Returns whether F.scaled_dot_product_attention may take flash attention:
// torch.backends.cuda.enable_flash_sdp, torch.nn.attention.sdpa_kernel. Where torch does not tell,
// it may not.
bool flash_enabled();

// Returns whether somebody has put cuDNN before flash attention in the order of
// F.scaled_dot_product_attention's backends. torch's own order, which has it there too, does not
// count.
bool cudnn_put_first();

}  // namespace fa4::aten
