#include "backward.h"

#include <array>

#include "../core/error.h"
#include "../core/launch/launch.h"
#include "bias.h"
#include "context.h"
#include "decide.h"
#include "profile_range.h"
#include "stock.h"
#include "torch_errors.h"

namespace fa4::aten {
namespace {

bool is_contiguous(AtenTensorHandle tensor) {
  bool result;
  check_shim(aoti_torch_is_contiguous(tensor, &result), "asking whether a tensor is contiguous");
  return result;
}

// Allocates the gradient of an input with the strides that the op promises.
Handle empty_gradient(const TensorInfo& input, Peer peer) {
  if (peer != Peer::kEfficient) return empty_like(input);
  int64_t stride[kMaxDim];
  rows_first_strides(input.size, stride);
  TensorInfo gradient = input;
  gradient.stride = stride;
  return empty(gradient);
}

// Clears the gradients of keys that no query sees; the kernels, which run later, get the other keys
// only. Where most keys are unseen, all rows are cleared, because torch fills a tensor without gaps
// faster.
void clear_unseen_keys(const BackwardCall& call, const Problem& p, const Gradients& gradients) {
  const int64_t rows = call.order == DimOrder::kHeadsFirst ? 2 : 1;
  for (const Handle* gradient : {&gradients.key, &gradients.value}) {
    const int64_t unseen = info(gradient->get()).size[rows] - p.seqlen_k;
    if (unseen > p.seqlen_k) {
      fill(gradient->get(), 0);
    } else if (unseen > 0) {
      fill(narrow(gradient->get(), rows, p.seqlen_k, unseen).get(), 0);
    }
  }
}

// Where a speed rule chooses PyTorch's kernel, clears the rows of its gradients, on the stack, that
// it leaves unwritten. Our own kernel would set these rows to zero.
void clear_unwritten(const BackwardCall& call, const BackwardDescription& d, StableIValue* stack) {
  std::array<Handle, 3> gradients;  // released where this throws
  for (size_t i = 0; i < gradients.size(); ++i)
    gradients[i] = Handle(torch::stable::detail::to<AtenTensorHandle>(stack[i]));
  const auto view_of = [&](const Handle& gradient) {
    return view(gradient.get(), info(gradient.get()), call.order);
  };
  const Problem& p = d.problem;
  const fa4::StockGradients found{view_of(gradients[0]), view_of(gradients[1]),
                                  view_of(gradients[2]), cu_seqlens(p, call.cum_seq_q),
                                  cu_seqlens(p, call.cum_seq_k)};
  launching([&] { fa4::clear_unwritten(p, found, d.target); });
  for (size_t i = 0; i < gradients.size(); ++i) stack[i] = give(std::move(gradients[i]));
}

}  // namespace

Gradients compute_gradients(const BackwardCall& call, const BackwardDescription& d,
                            const Plan& plan) {
  const Problem& p = d.problem;
  const int32_t device = d.query.device_index;
  Gradients gradients{empty_gradient(d.query, call.peer), empty_gradient(d.key, call.peer),
                      empty_gradient(d.value, call.peer)};
  if (plan.nothing_to_compute) {
    for (const Handle* gradient : {&gradients.query, &gradients.key, &gradients.value})
      fill(gradient->get(), 0);
    return gradients;
  }
  if (p.causal_top_left) clear_unseen_keys(call, p, gradients);
  const Handle workspace = empty(1, &plan.workspace.bytes, aoti_torch_dtype_uint8(), device);
  const Readable query(call.query.get(), d.query, call.order),
      key(call.key.get(), d.key, call.order), value(call.value.get(), d.value, call.order),
      out(call.out.get(), d.out, call.order), grad_out(call.grad_out.get(), d.grad_out, call.order);
  const ReadableBias bias(call.attn_bias, d.bias, p);
  const Handle lse_copy = is_contiguous(call.logsumexp.get())
                              ? Handle()
                              : contiguous_copy(call.logsumexp.get(), d.logsumexp);
  BackwardArguments arguments;
  arguments.q = query.view;
  arguments.k = seen_keys(key.view, p);
  arguments.v = seen_keys(value.view, p);
  arguments.o = out.view;
  arguments.grad_o = grad_out.view;
  arguments.bias = bias.view;
  arguments.dq = view(gradients.query.get(), info(gradients.query.get()), call.order);
  arguments.dk = seen_keys(view(gradients.key.get(), info(gradients.key.get()), call.order), p);
  arguments.dv = seen_keys(view(gradients.value.get(), info(gradients.value.get()), call.order), p);
  arguments.lse = static_cast<const float*>(data(lse_copy ? lse_copy.get() : call.logsumexp.get()));
  arguments.cu_seqlens_q = cu_seqlens(p, call.cum_seq_q);
  arguments.cu_seqlens_k = cu_seqlens(p, call.cum_seq_k);
  arguments.softmax_scale = softmax_scale(call.scale, p.head_dim);
  arguments.workspace = data(workspace.get());
  const ProfileRange range(plan.kernel->name);
  launching([&] { launch_backward(p, plan, arguments, d.target); });
  return gradients;
}

void backward(const BackwardCall& call, StableIValue* stack) {
  if (stock_is_running()) return stock_backward(call, stack);
  BackwardDescription d = describe(call);
  const bool torch_is_deterministic = deterministic_algorithms();
  d.problem.deterministic = call.deterministic || torch_is_deterministic;
  const bool stock_would_not_be = call.deterministic && !torch_is_deterministic;
  const Plan plan = decide(call.op, d, stock_would_not_be);
  if (!plan.supported()) {
    if (stock_would_not_be) {
      fail("FA4 ", call.op, " unsupported: ", *plan.reason, "; and PyTorch's flash attention, ",
           "which would run it, has no deterministic backward without ",
           "torch.use_deterministic_algorithms(True)");
    }
    stock_backward(call, stack);
    if (plan.stock_is_faster && d.problem.layout == Layout::kVarlen)
      clear_unwritten(call, d, stack);
    return;
  }
  warn_of_nondeterminism();
  Gradients gradients = compute_gradients(call, d, plan);
  stack[0] = give(std::move(gradients.query));
  stack[1] = give(std::move(gradients.key));
  stack[2] = give(std::move(gradients.value));
}

}  // namespace fa4::aten
