#include "../plan/choose_kernel.h"
#include "argument_list.h"
#include "driver.h"

namespace fa4 {

void clear_unwritten(const Problem& p, const StockGradients& g, const Target& target) {
  const DeviceScope scope(target.device);
  const Kernel* kernel = clear_kernel(p);
  if (!kernel) return;
  ArgumentList list(p, *kernel, whole(p));
  list.add(g.dq);
  list.add(g.dk);
  list.add(g.dv);
  list.add_cu_seqlens(g.cu_seqlens_q);
  list.add_cu_seqlens(g.cu_seqlens_k);
  list.add(p.sm_count);  // CTAs
  list.launch(target);
}

}  // namespace fa4
