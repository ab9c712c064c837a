#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

namespace fa4::aten {

// Asks for the running torch's version, not for that of the headers.
inline bool torch_is_at_least(uint64_t major, uint64_t minor) {
  return aoti_torch_abi_version() >= (major << 56 | minor << 48);
}

}  // namespace fa4::aten
