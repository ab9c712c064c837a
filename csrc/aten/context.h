// Reads torch's global settings that the stable C interface does not show.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <initializer_list>

namespace fa4::aten {

// Returns whether torch.use_deterministic_algorithms(True) is in force without warn_only. The stock
// kernel follows the same setting.
bool deterministic_algorithms();

// Warns before a backward that adds up in any order, once, under
// torch.use_deterministic_algorithms(True, warn_only=True), as the stock kernel does.
void warn_of_nondeterminism();

// Returns whether torch.backends.cuda.enable_flash_sdp and torch.nn.attention.sdpa_kernel let
// F.scaled_dot_product_attention take flash attention; false where torch does not tell.
bool flash_enabled();

// Returns whether somebody has put cuDNN before flash attention in the order of
// F.scaled_dot_product_attention's backends. torch's own order, which has it there too, does not
// count, even if somebody has asked for it.
bool cudnn_put_first();

// The same of memory-efficient attention, which torch's own order has behind flash attention.
bool efficient_put_first();

// Returns whether autograd records a call for one of these tensors; true where torch does not tell.
bool wants_gradient(std::initializer_list<AtenTensorHandle> tensors);

}  // namespace fa4::aten
