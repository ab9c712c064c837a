#include "launch.h"

#include <algorithm>

#include "dialect_runtime.h"
#include "driver.h"
#include "error.h"
#include "module.h"

namespace fa4 {
namespace {

// export_to_c's struct of a tensor whose shape is dynamic and whose strides are too, but for the last dimension's.
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
static_assert(sizeof(ExportedTensor<4>) == 48 && sizeof(ExportedTensor<3>) == 40 && sizeof(ExportedTensor<2>) == 24,
              "the objects' ABI");

union Exported {  // the rank is the layout's
  ExportedTensor<4> four;
  ExportedTensor<3> three;
  ExportedTensor<2> two;
};

// Pointers to a kernel's arguments, in the order of its entry under kernels/.
class ArgumentList {
 public:
  explicit ArgumentList(const Kernel& kernel) : kernel_(kernel), varlen_(kernel.layout == Layout::kVarlen) {}

  void add(void* pointer) { pointers_[count_++] = pointer; }

  // q, k, v, o and their gradients
  void add(const TensorView& t, Exported& storage) { varlen_ ? add(t, storage.three) : add(t, storage.four); }

  // Contiguous fp32 [batch,] heads, n: lse, delta, accumulators
  void add_rows(const void* data, int64_t batch, int64_t heads, int64_t n, Exported& storage) {
    void* pointer = const_cast<void*>(data);
    if (varlen_) {
      storage.two = {pointer, {static_cast<int32_t>(heads), static_cast<int32_t>(n)}, {n}};
      add(&storage.two);
    } else {
      storage.three = {
          pointer, {static_cast<int32_t>(batch), static_cast<int32_t>(heads), static_cast<int32_t>(n)}, {heads * n, n}};
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

  // cu_seqlens_k and seqused_k as the two rows of one tensor, whose stride is what lies between them.
  void add_key_lengths(const int32_t* cu_seqlens, const int32_t* seqused, int64_t batch, ExportedTensor<2>& storage) {
    if (!varlen_) return;
    const auto distance = reinterpret_cast<intptr_t>(seqused) - reinterpret_cast<intptr_t>(cu_seqlens);
    storage = {const_cast<int32_t*>(cu_seqlens),
               {seqused ? 2 : 1, static_cast<int32_t>(batch + 1)},
               {seqused ? distance / static_cast<intptr_t>(sizeof(int32_t)) : batch + 1}};
    add(&storage);
  }

  void add_counter(void* data, ExportedTensor<1>& storage) {
    if (varlen_) add_lengths(static_cast<int32_t*>(data), 1, storage);
  }

  void add_semaphore(void* data, int64_t batch, int64_t heads, int64_t tiles, int64_t slots, ExportedTensor<4>& storage) {
    storage = {data,
               {static_cast<int32_t>(batch), static_cast<int32_t>(heads), static_cast<int32_t>(tiles), static_cast<int32_t>(slots)},
               {heads * tiles * slots, tiles * slots, slots}};
    add(&storage);
  }

  void launch(const Target& target) {
    Function& function = loaded(kernel_, target.device);
    void* stream = target.stream;
    int32_t result = 0;
    add(&stream);
    add(&result);
    launch_compiled(kernel_, function, pointers_, count_);
    if (result) check(static_cast<CUresult>(result), concat("launching kernel ", kernel_.name).c_str());
  }

 private:
  template <int kRank>
  void add(const TensorView& t, ExportedTensor<kRank>& storage) {
    storage.data = t.data;
    for (int i = 0; i < kRank; ++i) storage.shape[i] = static_cast<int32_t>(t.size[i]);
    // The stride of a single row is never taken and may be anything, but TMA wants multiples of 16 bytes.
    for (int i = 0; i + 1 < kRank; ++i) storage.stride[i] = t.size[i] == 1 ? 0 : t.stride[i];
    add(&storage);
  }

  static constexpr int kMost = 24;
  const Kernel& kernel_;
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
                                  static_cast<size_t>(w.bytes - w.zeroed) / 4, static_cast<CUstream>(target.stream)),
        "clearing the workspace");
}

void preprocess(const Problem& p, const Plan& plan, const BackwardArguments& a, const Target& target) {
  const Workspace& w = plan.workspace;
  const Scratch scratch{static_cast<char*>(a.workspace)}, numbers = row_numbers(w, a);
  ArgumentList list(kKernels[plan.kernel->preprocess]);
  Exported o, grad_o, delta, lse, lse_log2, dq_accum;
  ExportedTensor<1> cu_seqlens;
  list.add(a.o, o);
  list.add(a.grad_o, grad_o);
  list.add_rows(numbers.at(w.delta), p.batch, p.num_heads, w.rows_q, delta);
  list.add_rows(a.lse, p.batch, p.num_heads, p.layout == Layout::kVarlen ? p.total_q : p.seqlen_q, lse);
  list.add_rows(numbers.at(w.lse_log2), p.batch, p.num_heads, w.rows_q, lse_log2);
  list.add_rows(scratch.at(w.dq_accum), p.batch, p.num_heads, w.rows_q * plan.kernel->head_dim, dq_accum);
  list.add_cu_seqlens(a.cu_seqlens_q, p.batch, cu_seqlens);
  list.launch(target);
}

void gradients(const Problem& p, const Plan& plan, const BackwardArguments& a, const Target& target) {
  const Kernel& kernel = *plan.kernel;
  const Workspace& w = plan.workspace;
  const Scratch scratch{static_cast<char*>(a.workspace)}, numbers = row_numbers(w, a);
  ArgumentList list(kernel);
  Exported q, k, v, grad_o, lse_log2, delta, dq_accum, dk, dv;
  ExportedTensor<1> cu_seqlens_q, cu_seqlens_k;
  ExportedTensor<4> dq_semaphore, dk_semaphore, dv_semaphore;
  float scale = a.softmax_scale;
  int32_t left = plan.window_size_left, right = plan.window_size_right;
  list.add(a.q, q);
  list.add(a.k, k);
  list.add(a.v, v);
  list.add(a.grad_o, grad_o);
  list.add_rows(numbers.at(w.lse_log2), p.batch, p.num_heads, w.rows_q, lse_log2);
  list.add_rows(numbers.at(w.delta), p.batch, p.num_heads, w.rows_q, delta);
  list.add_rows(scratch.at(w.dq_accum), p.batch, p.num_heads, w.rows_q * kernel.head_dim, dq_accum);
  if (kernel.grouped) {
    list.add_rows(scratch.at(w.dk_accum), p.batch, p.num_heads_kv, w.rows_k * kernel.head_dim, dk);
    list.add_rows(scratch.at(w.dv_accum), p.batch, p.num_heads_kv, w.rows_k * kernel.head_dim_v, dv);
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
    list.add_semaphore(scratch.at(w.dq_semaphore), p.batch, p.num_heads, w.tiles_q, w.cluster, dq_semaphore);
    if (kernel.grouped) {
      list.add_semaphore(scratch.at(w.dk_semaphore), p.batch, p.num_heads_kv, w.tiles_k, 2, dk_semaphore);
      list.add_semaphore(scratch.at(w.dv_semaphore), p.batch, p.num_heads_kv, w.tiles_k, 2, dv_semaphore);
    }
  }
  list.launch(target);
}

// fp32 accumulator -> gradient, for dQ (rows of q) or dK and dV (rows of k)
void postprocess(const Problem& p, int kernel_row, const void* accumulator, const TensorView& gradient, int64_t heads, int64_t rows,
                 float scale, const int32_t* cu_seqlens, const Target& target) {
  const Kernel& kernel = kKernels[kernel_row];
  ArgumentList list(kernel);
  Exported accum, grad;
  ExportedTensor<1> lengths;
  list.add_rows(accumulator, p.batch, heads, rows * kernel.head_dim, accum);
  list.add(gradient, grad);
  list.add(&scale);
  list.add_cu_seqlens(cu_seqlens, p.batch, lengths);
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

void decode(const Problem& p, const Plan& plan, const ForwardArguments& a, const Target& target) {
  const bool varlen = p.layout == Layout::kVarlen;
  ArgumentList list(*plan.kernel);
  Exported q, k, v, o, lse;
  ExportedTensor<1> cu_seqlens_q, cu_seqlens_k, seqused_k;
  ExportedTensor<2> block_table{};
  const bool paged = p.page_size > 0;
  if (paged) {
    block_table = {const_cast<int32_t*>(a.block_table),
                   {static_cast<int32_t>(p.batch), static_cast<int32_t>(a.block_table_columns)},
                   {a.block_table_stride}};
  }
  float scale = a.softmax_scale;
  int32_t left = plan.window_size_left, right = plan.window_size_right;
  int32_t max_seqlen_q = static_cast<int32_t>(p.seqlen_q), splits = plan.splits;
  list.add(with_batch(a.q, p), q);
  list.add(paged ? a.k : with_batch(a.k, p), k);
  list.add(paged ? a.v : with_batch(a.v, p), v);
  list.add(with_batch(a.o, p), o);
  list.add_rows(a.lse, varlen ? 1 : p.batch, p.num_heads, varlen ? p.total_q : p.seqlen_q, lse);
  list.add(&scale);
  list.add_lengths(a.cu_seqlens_q, p.batch + 1, cu_seqlens_q);
  list.add_lengths(a.cu_seqlens_k, p.batch + 1, cu_seqlens_k);
  list.add_lengths(a.seqused_k, p.batch, seqused_k);
  list.add(&block_table);
  list.add(&left);
  list.add(&right);
  list.add(&max_seqlen_q);
  list.add(&splits);
  list.launch(target);
}

}  // namespace

void launch_forward(const Problem& p, const Plan& plan, const ForwardArguments& a, const Target& target) {
  const DeviceScope scope(target.device);
  const Kernel& kernel = *plan.kernel;
  if (kernel.op == Op::kDecode) return decode(p, plan, a, target);
  clear(plan.workspace, {static_cast<char*>(a.workspace)}, target);
  ArgumentList list(kernel);
  Exported q, k, v, o, lse;
  ExportedTensor<1> cu_seqlens_q;
  ExportedTensor<2> key_lengths;
  float scale = a.softmax_scale;
  int32_t left = plan.window_size_left, right = plan.window_size_right;
  int32_t max_seqlen_q = static_cast<int32_t>(p.seqlen_q), sm_count = p.sm_count;
  int32_t workers = plan.workers, paired = plan.paired;
  list.add(a.q, q);
  list.add(a.k, k);
  list.add(a.v, v);
  list.add(a.o, o);
  list.add_rows(a.lse, p.batch, p.num_heads, p.layout == Layout::kVarlen ? p.total_q : p.seqlen_q, lse);
  list.add(&scale);
  list.add_cu_seqlens(a.cu_seqlens_q, p.batch, cu_seqlens_q);
  list.add_key_lengths(a.cu_seqlens_k, a.seqused_k, p.batch, key_lengths);
  list.add(&left);
  list.add(&right);
  if (kernel.arch == 100) {  // persistent grids are sized on the host
    list.add(&max_seqlen_q);
    list.add(&sm_count);
  }
  ExportedTensor<1> counter;
  if (kernel.persistent) {
    list.add(&workers);
    list.add(&paired);
    list.add_counter(a.workspace, counter);
  }
  list.launch(target);
}

void launch_backward(const Problem& p, const Plan& plan, const BackwardArguments& a, const Target& target) {
  const DeviceScope scope(target.device);
  const Workspace& w = plan.workspace;
  const Scratch scratch{static_cast<char*>(a.workspace)};
  clear(w, scratch, target);
  preprocess(p, plan, a, target);
  gradients(p, plan, a, target);
  postprocess(p, plan.kernel->postprocess_dq, scratch.at(w.dq_accum), a.dq, p.num_heads, w.rows_q, a.softmax_scale, a.cu_seqlens_q,
              target);
  if (plan.kernel->grouped) {
    postprocess(p, plan.kernel->postprocess_dk, scratch.at(w.dk_accum), a.dk, p.num_heads_kv, w.rows_k, a.softmax_scale,
                a.cu_seqlens_k, target);
    postprocess(p, plan.kernel->postprocess_dv, scratch.at(w.dv_accum), a.dv, p.num_heads_kv, w.rows_k, 1.0f, a.cu_seqlens_k,
                target);
  }
}

}  // namespace fa4
