#include "scratch.h"

#include "driver.h"

namespace fa4 {

void clear(const Workspace& w, const Scratch& scratch, const Target& target) {
  if (w.bytes == w.zeroed) return;
  check(driver().memset_d32_async(reinterpret_cast<CUdeviceptr>(scratch.at(w.zeroed)), 0,
                                  static_cast<size_t>(w.bytes - w.zeroed) / 4,
                                  static_cast<CUstream>(target.stream)),
        "clearing the workspace");
}

}  // namespace fa4
