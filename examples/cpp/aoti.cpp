// A model that export_aoti.py compiled ahead of time, its attention on fa4_ext's kernels.
#include <fa4_ext.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

#include "attention.h"

int main(int argc, char** argv) try {
  if (argc != 2)
    throw std::runtime_error(
        "usage: aoti PACKAGE, a file that export_aoti.py wrote on a machine like this one");
  const bool cuda = at::hasCUDA();
  const auto device = cuda ? at::kCUDA : at::kCPU;
  at::manual_seed(0);
  const auto random = [device] {
    return at::randn({2, 16, 1024, 128}, at::device(device).dtype(at::kBFloat16));
  };  // as exported
  const auto q = random(), k = random(), v = random();

  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const at::Tensor stock = model.run({q, k, v}).at(0);

  if (fa4_ext_register() != 0) throw std::runtime_error(fa4_ext_last_error());
  set_option("strict", 1);
  set_option("speed_rules", 0);
  const at::Tensor out = model.run({q, k, v}).at(0);
  const at::Tensor eager = at::scaled_dot_product_attention(q, k, v, {}, 0.0, /*is_causal=*/true);
  fa4_ext_remove();

  const double error = relative_error(out, eager);
  std::printf(
      "the package against at::scaled_dot_product_attention, both with fa4_ext: relative error "
      "%.1e\n",
      error);
  std::printf("the package with fa4_ext against without: relative error %.1e\n",
              relative_error(out, stock));
  if (!(error < kTolerance)) throw std::runtime_error("WRONG RESULT: the package and eager differ");
  if (!cuda) {
    std::printf("The package ran on PyTorch's kernels: no CUDA device is available\n");
    return 0;
  }
  // The same kernel gives the same bits as often as it runs, and fa4_ext's rounds other than
  // PyTorch's.
  if (!at::equal(out, eager))
    throw std::runtime_error("the package did not run the kernel that eager ran");
  if (at::equal(out, stock)) throw std::runtime_error("the package did not run fa4_ext's kernel");
  std::printf("The package ran on fa4_ext's kernels\n");
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "aoti: %s\n", error.what());
  return 1;
}
