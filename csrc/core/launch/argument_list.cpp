#include "argument_list.h"

#include "../error.h"
#include "dialect_runtime.h"
#include "driver.h"
#include "module.h"

namespace fa4 {
namespace {

// The driver loads a kernel's code at its first launch in a context. Which launch that is, is known
// of the primary context only.
void throw_launch_error(CUresult result, const Kernel& kernel, const Function& function,
                        bool whole_device) {
  const bool first = !function.in_primary_context.load(std::memory_order_acquire);
  const std::string step = !whole_device ? concat("loading or launching kernel ", kernel.name)
                           : first ? concat("loading kernel ", kernel.name, " (its first launch)")
                                   : concat("launching kernel ", kernel.name);
  check_memory(result, step, first || !whole_device);
}

}  // namespace

ArgumentList::ArgumentList(const Problem& p, const Kernel& kernel, const Part& part)
    : kernel_(kernel),
      part_(part),
      batch_(p.batch),
      dense_(p.layout == Layout::kDense),
      packed_(kernel.packed()),
      paged_(kernel.layout == Layout::kPaged) {}

void ArgumentList::add(const TensorView& tensor) {
  Argument& argument = next();
  packed_ ? put(tensor, 1, argument.three) : put(tensor, 2, argument.four);
}

void ArgumentList::add_keys(const TensorView& tensor) {
  if (!paged_) return add(tensor);
  put(tensor, 2, next().four);
}

template <int kRank>
void ArgumentList::put(const TensorView& t, int heads_dim, ExportedTensor<kRank>& argument) const {
  const int64_t heads = t.size[heads_dim];
  const int64_t offset =
      part_.first_of(heads) * t.stride[heads_dim] + (dense_ ? part_.batch * t.stride[0] : 0);
  argument.data = static_cast<char*>(t.data) + kElementBytes * offset;
  for (int i = 0; i < kRank; ++i) argument.shape[i] = static_cast<int32_t>(t.size[i]);
  argument.shape[heads_dim] = static_cast<int32_t>(part_.count_of(heads));
  if (dense_) argument.shape[0] = static_cast<int32_t>(part_.batches);
  // The stride of a single row is never taken and may be anything, but TMA wants multiples of 16
  // bytes.
  for (int i = 0; i + 1 < kRank; ++i) argument.stride[i] = argument.shape[i] == 1 ? 0 : t.stride[i];
}

void ArgumentList::add_rows(const void* data, int64_t heads, int64_t n) {
  const int64_t batch = dense_ ? part_.batch : 0, batches = dense_ ? part_.batches : 1;
  void* pointer = const_cast<float*>(static_cast<const float*>(data)) +
                  (batch * heads + part_.first_of(heads)) * n;
  const auto heads_here = static_cast<int32_t>(part_.count_of(heads)),
             rows = static_cast<int32_t>(n);
  if (packed_) {
    next().two = {pointer, {heads_here, rows}, {n}};
  } else {
    next().three = {pointer, {static_cast<int32_t>(batches), heads_here, rows}, {heads * n, n}};
  }
}

void ArgumentList::add_integers(const int32_t* data, int64_t count) {
  next().one = {const_cast<int32_t*>(data), {data ? static_cast<int32_t>(count) : 0}};
}

void ArgumentList::add_semaphore(int32_t* data, int64_t heads, int64_t tiles, int64_t slots) {
  next().four = {data + (part_.batch * heads + part_.first_of(heads)) * tiles * slots,
                 {static_cast<int32_t>(part_.batches), static_cast<int32_t>(part_.count_of(heads)),
                  static_cast<int32_t>(tiles), static_cast<int32_t>(slots)},
                 {heads * tiles * slots, tiles * slots, slots}};
}

void ArgumentList::add_bias(const BiasView& bias, int64_t batch, int64_t heads) {
  ExportedTensor<4>& argument = next().four;
  argument.data = const_cast<void*>(bias.data);
  const int64_t size[] = {batch, heads, bias.size[2], bias.size[3]};
  for (int i = 0; i < 4; ++i) argument.shape[i] = static_cast<int32_t>(size[i]);
  // The stride of what there is one of may be anything, but the kernels read pairs of elements.
  for (int i = 0; i < 3; ++i) argument.stride[i] = bias.size[i] == 1 ? 0 : bias.stride[i];
}

void ArgumentList::add_map(int32_t* data, const MapShape& shape, int64_t batch, int64_t heads,
                           int64_t rows) {
  const int64_t head = shape.rows * shape.columns;
  next().four = {data,
                 {static_cast<int32_t>(batch), static_cast<int32_t>(heads),
                  static_cast<int32_t>(rows), static_cast<int32_t>(shape.columns)},
                 {shape.batch == 1 ? 0 : shape.heads * head, shape.heads == 1 ? 0 : head,
                  shape.rows == 1 ? 0 : shape.columns}};
}

void ArgumentList::add_table(const int32_t* data, int64_t rows, int64_t columns,
                             int64_t row_stride) {
  next().two = {const_cast<int32_t*>(data),
                {data ? static_cast<int32_t>(rows) : 0, static_cast<int32_t>(columns)},
                {row_stride}};
}

void ArgumentList::add_cu_seqlens(const int32_t* cu_seqlens) {
  if (packed_) add_integers(cu_seqlens, batch_ + 1);
}

void ArgumentList::add_key_lengths(const int32_t* cu_seqlens, const int32_t* seqused) {
  if (!packed_ || paged_) return;
  const auto distance =
      reinterpret_cast<intptr_t>(seqused) - reinterpret_cast<intptr_t>(cu_seqlens);
  next().two = {const_cast<int32_t*>(cu_seqlens),
                {seqused ? 2 : 1, static_cast<int32_t>(batch_ + 1)},
                {seqused ? distance / static_cast<intptr_t>(sizeof(int32_t)) : batch_ + 1}};
}

void ArgumentList::add_pages(const ForwardArguments& a) {
  if (!paged_) return;
  add_integers(a.cu_seqlens_k, batch_ + 1);
  add_integers(a.seqused_k, batch_);
  add_table(a.block_table, batch_, a.block_table_columns, a.block_table_stride);
}

void ArgumentList::add_counter(void* data) {
  if (packed_) add_integers(static_cast<int32_t*>(data), 1);
}

bool ArgumentList::launch_if_clusters_fit(const Target& target) {
  if (count_ != kernel_.num_arguments) wrong_number();
  Function& function = loaded(kernel_, target.device);
  void* stream = target.stream;
  int32_t result = 0;
  pointers_[count_] = &stream;
  pointers_[count_ + 1] = &result;
  launch_compiled(kernel_, function, target.whole_device, pointers_, count_ + 2);
  if (result == CUDA_ERROR_INVALID_CLUSTER_SIZE) return false;
  if (result) {
    if (target.whole_device && !function.in_primary_context) load_anew(kernel_);
    throw_launch_error(static_cast<CUresult>(result), kernel_, function, target.whole_device);
  }
  return true;
}

void ArgumentList::wrong_number() const {
  fail("kernel ", kernel_.name, " takes ", kernel_.num_arguments, " arguments, is given ", count_,
       count_ == kMost ? " or more" : "");
}

void ArgumentList::launch(const Target& target) {
  if (launch_if_clusters_fit(target)) return;
  fail("launching kernel ", kernel_.name,
       " failed: its clusters do not fit the SMs that the stream may use");
}

void ArgumentList::launch_split(int32_t splits, const Target& target) {
  int32_t& split_into = add(splits);
  while (split_into > 1) {
    if (launch_if_clusters_fit(target)) return;
    split_into /= 2;
  }
  launch(target);
}

}  // namespace fa4
