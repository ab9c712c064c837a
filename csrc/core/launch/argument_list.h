// The arguments of one launch of a compiled kernel.
#pragma once

#include <cstdint>

#include "../plan/kernel_table.h"
#include "../plan/problem.h"
#include "../plan/workspace.h"
#include "launch.h"
#include "part.h"

namespace fa4 {

// The structs that export_to_c's entry points take for a tensor whose shape is dynamic, and whose
// strides are too, except the last dimension's.
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
                  sizeof(ExportedTensor<2>) == 24 && sizeof(ExportedTensor<1>) == 16,
              "the objects' ABI");

// Takes the arguments in the order that kernels/arguments.py declares. The build holds the objects
// to that order. A launch checks the list's number of arguments; only the interpreter and the GPU
// tests show that their order is the same.
// Tensors are given whole; the kernel sees the part of them that the list is for. The list holds
// what it points to, in memory of its own on the stack.
class ArgumentList {
 public:
  ArgumentList(const Problem& problem, const Kernel& kernel, const Part& part);
  ArgumentList(const ArgumentList&) = delete;
  ArgumentList& operator=(const ArgumentList&) = delete;

  void add(float value) { next().number = value; }
  // Returns the argument, which may be changed for another launch.
  int32_t& add(int32_t value) { return next().integer = value; }
  // q, k, v, o or one of their gradients
  void add(const TensorView& tensor);
  // k or v of a forward, which may lie in pages
  void add_keys(const TensorView& tensor);
  // Contiguous fp32 [batch,] heads, n: lse, delta, an accumulator
  void add_rows(const void* data, int64_t heads, int64_t n);
  // Contiguous int32; without elements where there is no data.
  void add_integers(const int32_t* data, int64_t count);
  // Contiguous int32 batch, heads, tiles, slots
  void add_semaphore(int32_t* data, int64_t heads, int64_t tiles, int64_t slots);
  // These two are whole in every part, because the kernels that take them run a problem in one.
  // They are broadcast to `batch` entries and `heads`.
  void add_bias(const BiasView& bias, int64_t batch, int64_t heads);
  // Contiguous int32
  void add_map(int32_t* data, const MapShape& shape, int64_t batch, int64_t heads, int64_t rows);
  // Rows of `columns` int32 each; without rows where there is no data.
  void add_table(const int32_t* data, int64_t rows, int64_t columns, int64_t row_stride);

  // These are arguments of kernels for packed queries only; in a dense one's list they add nothing.
  void add_cu_seqlens(const int32_t* cu_seqlens);
  void add_counter(void* data);
  // Without pages, cu_seqlens_k and seqused_k are the two rows of one tensor, whose stride is what
  // lies between them. With pages this adds nothing.
  void add_key_lengths(const int32_t* cu_seqlens, const int32_t* seqused);
  // With pages alone: the same lengths, and the block table.
  void add_pages(const ForwardArguments& arguments);

  // Returns whether the device, or the part of it that the stream has, can hold the kernel's
  // clusters. Nothing was launched where it cannot.
  bool launch_if_clusters_fit(const Target& target);
  void launch(const Target& target);
  // Adds `splits`, which the clusters' size follows, and launches with as many of them as fit. The
  // planner's choice is for a device of so many SMs; the CTAs of a cluster must also lie near each
  // other.
  void launch_split(int32_t splits, const Target& target);

 private:
  union Argument {
    ExportedTensor<4> four;
    ExportedTensor<3> three;
    ExportedTensor<2> two;
    ExportedTensor<1> one;
    float number;
    int32_t integer;
  };

  Argument& next() {
    if (count_ == kMost) wrong_number();
    pointers_[count_] = &arguments_[count_];
    return arguments_[count_++];
  }
  [[noreturn]] void wrong_number() const;
  template <int kRank>
  void put(const TensorView& tensor, int heads_dim, ExportedTensor<kRank>& argument) const;

  const Kernel& kernel_;
  const Part part_;
  const int64_t batch_;  // of the problem
  const bool dense_;     // the tensors' first dimension is the batch
  const bool packed_;    // the kernel's queries are
  const bool paged_;     // the kernel's keys and values are

  // The longest list, a deterministic GQA backward's, has 17.
  static constexpr int kMost = 20;
  Argument arguments_[kMost];
  void* pointers_[kMost + 2];  // the stream and the result come last
  int32_t count_ = 0;
};

}  // namespace fa4
