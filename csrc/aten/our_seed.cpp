#include "our_seed.h"

namespace fa4::aten {
namespace {

// A seed of ours begins behind the first two numbers of its memory. These are 16 bytes, to which
// compiled programs expect every tensor to be aligned.
constexpr int64_t kOurSeed = 2;

}  // namespace

Handle our_seed(int32_t device_index) {
  constexpr int64_t kNumbers = kOurSeed + 1;
  const Handle numbers = empty(1, &kNumbers, aoti_torch_dtype_int64(), device_index);
  return number_in(numbers.get(), kOurSeed);
}

bool is_our_seed(AtenTensorHandle philox_seed) {
  if (!defined(philox_seed)) return false;
  int64_t offset;
  check_shim(aoti_torch_get_storage_offset(philox_seed, &offset), "reading a tensor's offset");
  return offset == kOurSeed;
}

}  // namespace fa4::aten
