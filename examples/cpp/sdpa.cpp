// Attention on fa4_ext's kernels, forward and backward, checked against fp32 math.
#include <ATen/core/dispatch/Dispatcher.h>
#include <fa4_ext.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>

#include "attention.h"

namespace {

constexpr int64_t kBatch = 2, kHeads = 16, kSeqlen = 1024, kHeadDim = 128;

// The ops that fa4_ext_register() overrides in every torch since 2.11.
constexpr const char* kOps[] = {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_cudnn_attention_backward",
    "aten::_cudnn_attention_forward",
    "aten::_cudnn_attention_backward",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_flash_attention_forward",
    "aten::_flash_attention_backward",
};

struct Result {
  at::Tensor out, dq, dk, dv;
};

// Who registered the kernel that PyTorch's dispatcher calls for CUDA tensors.
std::string cuda_kernel(const char* op) {
  std::istringstream entries(c10::Dispatcher::singleton().findSchemaOrThrow(op, "").dumpState());
  for (std::string entry; std::getline(entries, entry);) {
    if (entry.rfind("CUDA: ", 0) != 0) continue;
    entry = entry.substr(0, entry.find(" :: "));
    return entry.substr(entry.find_last_of("/ ") + 1);
  }
  return "none";
}

void show_registration(const char* when) {
  std::printf("%s\n", when);
  for (const char* op : kOps) std::printf("  %s  %s\n", op, cuda_kernel(op).c_str());
}

// What fa4_ext::explain, torch.ops.fa4_ext.explain in Python, says of a causal call: the kernel
// that runs it, or an empty name and why none does.
struct Explanation {
  std::string kernel, reason;
};

// A device that explain() may be asked about: the tensors' own, or any other.
struct Device {
  int64_t capability = 0, sm_count = 0;
};
constexpr Device kHopper = {90, 132};

Explanation explain(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool backward,
                    Device device = {}) {
  const c10::IValue none;
  c10::Stack stack;  // the arguments in the order of the schema, [batch, seqlen, heads, head_dim]
  torch::jit::push(stack, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                   /*cum_seq_q=*/none, /*cum_seq_k=*/none,
                   /*max_q=*/q.size(2), /*max_k=*/k.size(2), /*dropout_p=*/0.0, /*is_causal=*/true,
                   /*return_debug_mask=*/false,
                   /*scale=*/none, /*window_size_left=*/none, /*window_size_right=*/none,
                   /*seqused_k=*/none,
                   /*alibi_slopes=*/none, /*block_table=*/none, /*num_splits=*/none,
                   /*deterministic=*/false, backward,
                   /*speed_rules=*/false, device.capability, device.sm_count,
                   /*peer=*/"cudnn",  // PyTorch takes the call to cuDNN's op on these GPUs
                   /*own=*/false, /*attn_mask=*/none);
  c10::Dispatcher::singleton().findSchemaOrThrow("fa4_ext::explain", "").callBoxed(stack);
  return {stack.at(1).toStringRef(), stack.at(2).toStringRef()};  // at(0): whether there is one
}

at::Tensor leaf(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.detach().to(dtype).requires_grad_();
}

Result attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const at::Tensor& grad) {
  const auto x = leaf(q, at::kBFloat16), y = leaf(k, at::kBFloat16), z = leaf(v, at::kBFloat16);
  const auto out = at::scaled_dot_product_attention(x, y, z, {}, 0.0, /*is_causal=*/true);
  out.backward(grad);
  return {out.detach(), x.grad(), y.grad(), z.grad()};
}

Result reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const at::Tensor& grad) {
  const auto x = leaf(q, at::kFloat), y = leaf(k, at::kFloat), z = leaf(v, at::kFloat);
  const auto hidden = at::ones({q.size(2), k.size(2)}, q.options().dtype(at::kBool)).triu(1);
  const auto scores =
      at::matmul(x, y.transpose(-1, -2)) / std::sqrt(static_cast<double>(q.size(3)));
  const auto out = at::matmul(scores.masked_fill(hidden, -INFINITY).softmax(-1), z);
  out.backward(grad.to(at::kFloat));
  return {out.detach(), x.grad(), y.grad(), z.grad()};
}

// A call with dropout, which no kernel of fa4_ext runs, raises under strict: so these calls get to
// fa4_ext, not to another backend.
void check_that_calls_arrive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  try {
    at::scaled_dot_product_attention(q, k, v, {}, /*dropout_p=*/0.5, /*is_causal=*/true);
  } catch (const std::exception& error) {
    if (std::strstr(error.what(), "unsupported: dropout_p must be 0")) return;
    throw;
  }
  throw std::runtime_error(
      "a call with dropout ran: at::scaled_dot_product_attention did not get to fa4_ext");
}

bool run_attention() {
  at::manual_seed(0);
  const auto random = [] {
    return at::randn({kBatch, kHeads, kSeqlen, kHeadDim},
                     at::device(at::kCUDA).dtype(at::kBFloat16));
  };
  const auto q = random(), k = random(), v = random(), grad = random();
  const Explanation forward = explain(q, k, v, false), backward = explain(q, k, v, true);
  if (forward.kernel.empty() || backward.kernel.empty()) {
    std::printf("Attention was not run, fa4_ext has no kernel for it: %s\n",
                (forward.kernel.empty() ? forward : backward).reason.c_str());
    return true;
  }

  set_option("strict", 1);
  set_option("speed_rules", 0);
  check_that_calls_arrive(q, k, v);
  const Result result = attention(q, k, v, grad), expected = reference(q, k, v, grad);

  std::printf("Causal attention, bf16, B%ld H%ld S%ld D%ld: relative error against fp32 math\n",
              kBatch, kHeads, kSeqlen, kHeadDim);
  bool right = true;
  const auto report = [&right](const char* name, const at::Tensor& tensor,
                               const at::Tensor& reference, const Explanation& ran) {
    const double error = relative_error(tensor, reference);
    right = right && error < kTolerance;  // false for NaN
    std::printf("  %-3s  %.1e  %s\n", name, error, ran.kernel.c_str());
  };
  report("out", result.out, expected.out, forward);
  report("dq", result.dq, expected.dq, backward);
  report("dk", result.dk, expected.dk, backward);
  report("dv", result.dv, expected.dv, backward);
  if (right) {
    std::printf("Attention ran on fa4_ext's kernels\n");
  } else {
    std::printf("WRONG RESULT: an error is not below %.0e\n", kTolerance);
  }
  return right;
}

// Without a GPU fa4_ext still says what would run.
void show_hoppers_kernels() {
  const auto tensor =
      at::empty({kBatch, kHeads, kSeqlen, kHeadDim}, at::device(at::kMeta).dtype(at::kBFloat16));
  std::printf("Attention was not run: no CUDA device is available. On Hopper it would run on\n");
  for (bool backward : {false, true}) {
    const Explanation found = explain(tensor, tensor, tensor, backward, kHopper);
    std::printf("  %s%s\n", found.kernel.c_str(), found.reason.c_str());
  }
}

}  // namespace

int main() try {
  show_registration("Before fa4_ext_register()");
  if (fa4_ext_register() != 0) throw std::runtime_error(fa4_ext_last_error());
  show_registration("After it");
  bool right = true;
  if (at::hasCUDA()) {
    right = run_attention();
  } else {
    show_hoppers_kernels();
  }
  fa4_ext_remove();
  show_registration("After fa4_ext_remove()");
  return right ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "sdpa: %s\n", error.what());
  return 1;
}
