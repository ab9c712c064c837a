#include "launch.h"

#include <algorithm>

#include "../error.h"
#include "../integers.h"
#include "dialect_runtime.h"
#include "driver.h"
#include "module.h"

namespace fa4 {
namespace {

// export_to_c's struct of a tensor whose shape is dynamic and whose strides are too, but for the
// last dimension's.
template <int kRank>
struct ExportedTensor {
  void* data;
  int32_t shape[kRank];
  int64_t stride[kRank - 1];
};
template <>
struct ExportedTensor<1> {
  void* data;
  int32_t shape[1];
};
static_assert(sizeof(ExportedTensor<4>) == 48 && sizeof(ExportedTensor<3>) == 40 &&
                  sizeof(ExportedTensor<2>) == 24,
              "the objects' ABI");

union Exported {  // the rank is the layout's
  ExportedTensor<4> four;
  ExportedTensor<3> three;
  ExportedTensor<2> two;
};

// Some of a problem's batch entries and heads. A grid's y and z, where most kernels have these,
// hold no more than kMaxGrid.
struct Part {
  int64_t batch, batches;     // the first entry, and how many
  int64_t head_kv, heads_kv;  // the same of key/value heads
  int64_t all_heads_kv;       // of the problem

  int64_t head(int64_t heads) const {
    return head_kv * (heads / all_heads_kv);
  }  // the first, of a tensor with so many in all
  int64_t heads(int64_t heads) const { return heads_kv * (heads / all_heads_kv); }
};

// Calls `launch` with parts that make up the problem: one, but for batches and heads beyond a grid.
template <class Launch>
void for_each_part(const Problem& p, const Kernel& kernel, Launch&& launch) {
  const int64_t ratio = p.num_heads / p.num_heads_kv;
  // Grids of packed sequences have them in x, but for the decode kernel's. Persistent grids have
  // neither batch nor heads.
  const bool batch_in_z = kernel.layout != Layout::kVarlen && !kernel.persistent,
             heads_in_y = !kernel.persistent;
  const int64_t most_batches = batch_in_z ? kMaxGrid : p.batch,
                most_heads = heads_in_y ? kMaxGrid / ratio : p.num_heads_kv;
  for (int64_t batch = 0; batch < p.batch; batch += most_batches) {
    for (int64_t head = 0; head < p.num_heads_kv; head += most_heads) {
      launch(Part{batch, std::min(most_batches, p.batch - batch), head,
                  std::min(most_heads, p.num_heads_kv - head), p.num_heads_kv});
    }
  }
}

// Pointers to a kernel's arguments, in the order of its entry under kernels/. Tensors are given
// whole; the kernel sees a part.
class ArgumentList {
 public:
  ArgumentList(const Problem& p, const Kernel& kernel, const Part& part)
      : kernel_(kernel),
        part_(part),
        dense_(p.layout == Layout::kDense),
        varlen_(kernel.layout == Layout::kVarlen) {}

  void add(void* pointer) { pointers_[count_++] = pointer; }

  // q, k, v, o and their gradients
  void add(const TensorView& t, Exported& storage) {
    varlen_ ? add(t, 1, storage.three) : add(t, 2, storage.four);
  }

  // Contiguous fp32 [batch,] heads, n: lse, delta, accumulators
  void add_rows(const void* data, int64_t heads, int64_t n, Exported& storage) {
    const int64_t batch = dense_ ? part_.batch : 0, batches = dense_ ? part_.batches : 1;
    void* pointer = const_cast<float*>(static_cast<const float*>(data)) +
                    (batch * heads + part_.head(heads)) * n;
    const auto heads_here = static_cast<int32_t>(part_.heads(heads)),
               rows = static_cast<int32_t>(n);
    if (varlen_) {
      storage.two = {pointer, {heads_here, rows}, {n}};
      add(&storage.two);
    } else {
      storage.three = {pointer, {static_cast<int32_t>(batches), heads_here, rows}, {heads * n, n}};
      add(&storage.three);
    }
  }

  // Without elements where there are none.
  void add_lengths(const int32_t* data, int64_t count, ExportedTensor<1>& storage) {
    storage = {const_cast<int32_t*>(data), {data ? static_cast<int32_t>(count) : 0}};
    add(&storage);
  }

  void add_cu_seqlens(const int32_t* data, int64_t batch, ExportedTensor<1>& storage) {
    if (varlen_) add_lengths(data, batch + 1, storage);
  }

  // cu_seqlens_k and seqused_k as the two rows of one tensor, whose stride is what lies between
  // them.
  void add_key_lengths(const int32_t* cu_seqlens, const int32_t* seqused, int64_t batch,
                       ExportedTensor<2>& storage) {
    if (!varlen_) return;
    const auto distance =
        reinterpret_cast<intptr_t>(seqused) - reinterpret_cast<intptr_t>(cu_seqlens);
    storage = {const_cast<int32_t*>(cu_seqlens),
               {seqused ? 2 : 1, static_cast<int32_t>(batch + 1)},
               {seqused ? distance / static_cast<intptr_t>(sizeof(int32_t)) : batch + 1}};
    add(&storage);
  }

  void add_counter(void* data, ExportedTensor<1>& storage) {
    if (varlen_) add_lengths(static_cast<int32_t*>(data), 1, storage);
  }

  // Contiguous int32 batch, heads, tiles, slots
  void add_semaphore(int32_t* data, int64_t heads, int64_t tiles, int64_t slots,
                     ExportedTensor<4>& storage) {
    storage = {data + (part_.batch * heads + part_.head(heads)) * tiles * slots,
               {static_cast<int32_t>(part_.batches), static_cast<int32_t>(part_.heads(heads)),
                static_cast<int32_t>(tiles), static_cast<int32_t>(slots)},
               {heads * tiles * slots, tiles * slots, slots}};
    add(&storage);
  }

  // Returns whether the device, or the part of it that the stream has, can hold the kernel's
  // clusters: if not, nothing was launched.
  bool launch_if_clusters_fit(const Target& target) {
    Function& function = loaded(kernel_, target.device);
    void* stream = target.stream;
    int32_t result = 0;
    pointers_[count_] = &stream;
    pointers_[count_ + 1] = &result;
    launch_compiled(kernel_, function, target.whole_device, pointers_, count_ + 2);
    if (result == CUDA_ERROR_INVALID_CLUSTER_SIZE) return false;
    if (result) failed(static_cast<CUresult>(result), function);
    return true;
  }

  void launch(const Target& target) {
    if (!launch_if_clusters_fit(target)) {
      fail("launching kernel ", kernel_.name,
           " failed: its clusters do not fit the multiprocessors that the stream may use");
    }
  }

 private:
  void failed(CUresult result, const Function& function) {
    const bool first = !function.in_primary_context.load(std::memory_order_acquire);
    if (first || result == CUDA_ERROR_OUT_OF_MEMORY)
      check_loading(result, kernel_, first ? "its first launch" : "a launch");
    check(result, concat("launching kernel ", kernel_.name).c_str());
  }

  template <int kRank>
  void add(const TensorView& t, int heads, ExportedTensor<kRank>& storage) {
    const int64_t offset =
        part_.head(t.size[heads]) * t.stride[heads] + (dense_ ? part_.batch * t.stride[0] : 0);
    storage.data = static_cast<char*>(t.data) + kElementBytes * offset;
    for (int i = 0; i < kRank; ++i) storage.shape[i] = static_cast<int32_t>(t.size[i]);
    storage.shape[heads] = static_cast<int32_t>(part_.heads(t.size[heads]));
    if (dense_) storage.shape[0] = static_cast<int32_t>(part_.batches);
    // The stride of a single row is never taken and may be anything, but TMA wants multiples of 16
    // bytes.
    for (int i = 0; i + 1 < kRank; ++i) storage.stride[i] = storage.shape[i] == 1 ? 0 : t.stride[i];
    add(&storage);
  }

  static constexpr int kMost = 24;
  const Kernel& kernel_;
  Part part_;
  bool dense_;  // the tensors' first dimension is the batch
  bool varlen_;
  void* pointers_[kMost];
  int32_t count_ = 0;
};

struct Scratch {
  char* base;
  template <class T = void>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base + offset);
  }
};

// lse_log2 and delta
Scratch row_numbers(const Workspace& w, const BackwardArguments& a) {
  return {static_cast<char*>(w.numbers_in_dq ? a.dq.data : a.workspace)};
}

void clear(const Workspace& w, const Scratch& scratch, const Target& target) {
  if (w.bytes == w.zeroed) return;
  check(driver().memset_d32_async(reinterpret_cast<CUdeviceptr>(scratch.at(w.zeroed)), 0,
                                  static_cast<size_t>(w.bytes - w.zeroed) / 4,
                                  static_cast<CUstream>(target.stream)),
        "clearing the workspace");
}

void preprocess(const Problem& p, const Plan& plan, const BackwardArguments& a, const Part& part,
                const Target& target) {
  const Workspace& w = plan.workspace;
  const Scratch scratch{static_cast<char*>(a.workspace)}, numbers = row_numbers(w, a);
  ArgumentList list(p, kKernels[plan.kernel->preprocess], part);
  Exported o, grad_o, delta, lse, lse_log2, dq_accum;
  ExportedTensor<1> cu_seqlens;
  list.add(a.o, o);
  list.add(a.grad_o, grad_o);
  list.add_rows(numbers.at(w.delta), p.num_heads, w.rows_q, delta);
  list.add_rows(a.lse, p.num_heads, p.layout == Layout::kVarlen ? p.total_q : p.seqlen_q, lse);
  list.add_rows(numbers.at(w.lse_log2), p.num_heads, w.rows_q, lse_log2);
  list.add_rows(scratch.at(w.dq_accum), p.num_heads, w.rows_q * plan.kernel->head_dim, dq_accum);
  list.add_cu_seqlens(a.cu_seqlens_q, p.batch, cu_seqlens);
  list.launch(target);
}

void gradients(const Problem& p, const Plan& plan, const BackwardArguments& a, const Part& part,
               const Target& target) {
  const Kernel& kernel = *plan.kernel;
  const Workspace& w = plan.workspace;
  const Scratch scratch{static_cast<char*>(a.workspace)}, numbers = row_numbers(w, a);
  ArgumentList list(p, kernel, part);
  Exported q, k, v, grad_o, lse_log2, delta, dq_accum, dk, dv;
  ExportedTensor<1> cu_seqlens_q, cu_seqlens_k;
  ExportedTensor<4> dq_semaphore, dk_semaphore, dv_semaphore;
  float scale = a.softmax_scale;
  int32_t left = plan.window_size_left, right = plan.window_size_right;
  list.add(a.q, q);
  list.add(a.k, k);
  list.add(a.v, v);
  list.add(a.grad_o, grad_o);
  list.add_rows(numbers.at(w.lse_log2), p.num_heads, w.rows_q, lse_log2);
  list.add_rows(numbers.at(w.delta), p.num_heads, w.rows_q, delta);
  list.add_rows(scratch.at(w.dq_accum), p.num_heads, w.rows_q * kernel.head_dim, dq_accum);
  if (kernel.grouped) {
    list.add_rows(scratch.at(w.dk_accum), p.num_heads_kv, w.rows_k * kernel.head_dim, dk);
    list.add_rows(scratch.at(w.dv_accum), p.num_heads_kv, w.rows_k * kernel.head_dim_v, dv);
  } else {
    list.add(a.dk, dk);
    list.add(a.dv, dv);
  }
  list.add(&scale);
  list.add_cu_seqlens(a.cu_seqlens_q, p.batch, cu_seqlens_q);
  list.add_cu_seqlens(a.cu_seqlens_k, p.batch, cu_seqlens_k);
  list.add(&left);
  list.add(&right);
  if (kernel.deterministic) {
    list.add_semaphore(scratch.at<int32_t>(w.dq_semaphore), p.num_heads, w.tiles_q, w.cluster,
                       dq_semaphore);
    if (kernel.grouped) {
      list.add_semaphore(scratch.at<int32_t>(w.dk_semaphore), p.num_heads_kv, w.tiles_k, 2,
                         dk_semaphore);
      list.add_semaphore(scratch.at<int32_t>(w.dv_semaphore), p.num_heads_kv, w.tiles_k, 2,
                         dv_semaphore);
    }
  }
  list.launch(target);
}

// Gradients that another kernel writes where there are sequences, and where there are none the
// postprocess of dQ clears.
struct Others {
  TensorView dk, dv;
  const int32_t* cu_seqlens = nullptr;
};

// fp32 accumulator -> gradient, for dQ (rows of q) or dK and dV (rows of k)
void postprocess(const Problem& p, int kernel_row, const void* accumulator,
                 const TensorView& gradient, int64_t heads, int64_t rows, float scale,
                 const int32_t* cu_seqlens, const Others& others, const Part& part,
                 const Target& target) {
  const Kernel& kernel = kKernels[kernel_row];
  ArgumentList list(p, kernel, part);
  Exported accum, grad, dk, dv;
  ExportedTensor<1> lengths, lengths_k;
  list.add_rows(accumulator, heads, rows * kernel.head_dim, accum);
  list.add(gradient, grad);
  list.add(&scale);
  if (kernel.layout == Layout::kVarlen) {
    list.add_lengths(cu_seqlens, p.batch + 1, lengths);
    list.add(others.dk, dk);
    list.add(others.dv, dv);
    list.add_lengths(others.cu_seqlens, p.batch + 1, lengths_k);
  }
  list.launch(target);
}

// [batch, seqlen, heads, head_dim]; varlen tensors are one row of sequences.
TensorView with_batch(const TensorView& t, const Problem& p) {
  if (p.layout == Layout::kDense) return t;
  TensorView result = t;
  result.size[0] = 1;
  result.stride[0] = 0;
  std::copy_n(t.size, 3, result.size + 1);
  std::copy_n(t.stride, 3, result.stride + 1);
  return result;
}

void decode(const Problem& p, const Plan& plan, const ForwardArguments& a, const Part& part,
            const Target& target) {
  const bool varlen = p.layout == Layout::kVarlen, paged = p.page_size > 0;
  const auto of_part = [&part](const int32_t* lengths) {
    return lengths ? lengths + part.batch : nullptr;
  };
  ArgumentList list(p, *plan.kernel, part);
  Exported q, k, v, o, lse;
  ExportedTensor<1> cu_seqlens_q, cu_seqlens_k, seqused_k;
  ExportedTensor<2> block_table{};
  if (paged) {
    block_table = {
        const_cast<int32_t*>(a.block_table) + part.batch * a.block_table_stride,
        {static_cast<int32_t>(part.batches), static_cast<int32_t>(a.block_table_columns)},
        {a.block_table_stride}};
  }
  float scale = a.softmax_scale;
  int32_t left = plan.window_size_left, right = plan.window_size_right;
  int32_t max_seqlen_q = static_cast<int32_t>(p.seqlen_q), splits = plan.splits;
  list.add(with_batch(a.q, p), q);
  list.add(paged ? a.k : with_batch(a.k, p), k);
  list.add(paged ? a.v : with_batch(a.v, p), v);
  list.add(with_batch(a.o, p), o);
  list.add_rows(a.lse, p.num_heads, varlen ? p.total_q : p.seqlen_q, lse);
  list.add(&scale);
  list.add_lengths(of_part(a.cu_seqlens_q), part.batches + 1, cu_seqlens_q);
  list.add_lengths(of_part(a.cu_seqlens_k), part.batches + 1, cu_seqlens_k);
  list.add_lengths(of_part(a.seqused_k), part.batches, seqused_k);
  list.add(&block_table);
  list.add(&left);
  list.add(&right);
  list.add(&max_seqlen_q);
  list.add(&splits);
  // The planner's choice is for a device of so many multiprocessors. The CTAs of a cluster must
  // also lie near each other.
  while (splits > 1 && !list.launch_if_clusters_fit(target)) splits /= 2;
  if (splits == 1) list.launch(target);
}

void forward(const Problem& p, const Plan& plan, const ForwardArguments& a, const Part& part,
             const Target& target) {
  const Kernel& kernel = *plan.kernel;
  ArgumentList list(p, kernel, part);
  Exported q, k, v, o, lse;
  ExportedTensor<1> cu_seqlens_q, counter;
  ExportedTensor<2> key_lengths;
  float scale = a.softmax_scale;
  int32_t left = plan.window_size_left, right = plan.window_size_right;
  int32_t max_seqlen_q = static_cast<int32_t>(p.seqlen_q), sm_count = p.sm_count;
  int32_t workers = plan.workers, paired = plan.paired;
  list.add(a.q, q);
  list.add(a.k, k);
  list.add(a.v, v);
  list.add(a.o, o);
  list.add_rows(a.lse, p.num_heads, p.layout == Layout::kVarlen ? p.total_q : p.seqlen_q, lse);
  list.add(&scale);
  list.add_cu_seqlens(a.cu_seqlens_q, p.batch, cu_seqlens_q);
  list.add_key_lengths(a.cu_seqlens_k, a.seqused_k, p.batch, key_lengths);
  list.add(&left);
  list.add(&right);
  if (kernel.arch == 100) {  // persistent grids are sized on the host
    list.add(&max_seqlen_q);
    list.add(&sm_count);
  }
  if (kernel.persistent) {
    list.add(&workers);
    list.add(&paired);
    list.add_counter(a.workspace, counter);
  }
  list.launch(target);
}

const Kernel* find_clear(const Problem& p) {
  for (const Kernel* kernel = kKernels; kernel != kKernels + kNumKernels; ++kernel) {
    if (kernel->op == Op::kClear && kernel->arch == p.capability && kernel->dtype == p.dtype)
      return kernel;
  }
  return nullptr;
}

}  // namespace

void clear_unwritten(const Problem& p, const StockGradients& g, const Target& target) {
  const DeviceScope scope(target.device);
  const Kernel* kernel = find_clear(p);
  if (!kernel) return;
  ArgumentList list(p, *kernel, {0, p.batch, 0, p.num_heads_kv, p.num_heads_kv});
  Exported dq, dk, dv;
  ExportedTensor<1> cu_seqlens_q, cu_seqlens_k;
  int32_t workers = p.sm_count;
  list.add(g.dq, dq);
  list.add(g.dk, dk);
  list.add(g.dv, dv);
  list.add_cu_seqlens(g.cu_seqlens_q, p.batch, cu_seqlens_q);
  list.add_cu_seqlens(g.cu_seqlens_k, p.batch, cu_seqlens_k);
  list.add(&workers);
  list.launch(target);
}

void launch_forward(const Problem& p, const Plan& plan, const ForwardArguments& a,
                    const Target& target) {
  const DeviceScope scope(target.device);
  const bool is_decode = plan.kernel->op == Op::kDecode;
  clear(plan.workspace, {static_cast<char*>(a.workspace)}, target);
  for_each_part(p, *plan.kernel, [&](const Part& part) {
    (is_decode ? decode : forward)(p, plan, a, part, target);
  });
}

void launch_backward(const Problem& p, const Plan& plan, const BackwardArguments& a,
                     const Target& target) {
  const DeviceScope scope(target.device);
  const Workspace& w = plan.workspace;
  const Kernel& kernel = *plan.kernel;
  const Scratch scratch{static_cast<char*>(a.workspace)};
  const auto for_each = [&](const auto& launch) { for_each_part(p, kernel, launch); };
  clear(w, scratch, target);
  for_each([&](const Part& part) { preprocess(p, plan, a, part, target); });
  for_each([&](const Part& part) { gradients(p, plan, a, part, target); });
  const Others others = kernel.grouped ? Others{} : Others{a.dk, a.dv, a.cu_seqlens_k};
  for_each([&](const Part& part) {
    postprocess(p, kernel.postprocess_dq, scratch.at(w.dq_accum), a.dq, p.num_heads, w.rows_q,
                a.softmax_scale, a.cu_seqlens_q, others, part, target);
  });
  if (!kernel.grouped) return;
  for_each([&](const Part& part) {
    postprocess(p, kernel.postprocess_dk, scratch.at(w.dk_accum), a.dk, p.num_heads_kv, w.rows_k,
                a.softmax_scale, a.cu_seqlens_k, {}, part, target);
    postprocess(p, kernel.postprocess_dv, scratch.at(w.dv_accum), a.dv, p.num_heads_kv, w.rows_k,
                1.0f, a.cu_seqlens_k, {}, part, target);
  });
}

}  // namespace fa4
