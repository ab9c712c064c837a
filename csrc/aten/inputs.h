// What forward and backward ask of query, key, value and a bias alike: checks, and the fields of
// the Problem.
#pragma once

#include <optional>
#include <string>

#include "../core/plan/problem.h"
#include "tensors.h"

namespace fa4::aten {

// The metadata is borrowed: the call and its Description must outlive this. A tensor that was not
// given has none.
struct Inputs {
  const TensorInfo &q, &k, &v;
  std::optional<TensorInfo> cum_seq_q, cum_seq_k;  // none when dense
  std::optional<TensorInfo> block_table;           // none when not paged
  std::optional<TensorInfo> bias;
  int64_t bias_offset;  // in bytes: its address, or its offset where there is no memory
  int64_t max_q, max_k;
  double dropout_p;
  bool is_causal;
  std::optional<double> scale;
  std::optional<int64_t> window_size_left, window_size_right;
  DimOrder order;
  bool causal_top_left;  // is_causal, and aligned top-left

  bool varlen() const { return cum_seq_q.has_value(); }
  bool paged() const { return block_table.has_value(); }
};

std::optional<TensorInfo> info_if_given(AtenTensorHandle tensor);  // null: not given

bool same_shape(const TensorInfo& a, const TensorInfo& b);
bool same_device(const TensorInfo& a, const TensorInfo& b);

// Each returns the reason why our kernels cannot take the inputs; none where they can. Call
// check_tensors first, then check_lengths, then fill_problem.
std::optional<std::string> check_tensors(const Inputs& inputs);
std::optional<std::string> check_lengths(const Inputs& inputs);
// The same of `indices`, an optional argument that must be contiguous int32 on query's device.
std::optional<std::string> check_indices(const char* name, const TensorInfo& indices,
                                         const TensorInfo& query);

// Fills the fields that follow from the inputs.
void fill_problem(const Inputs& inputs, Problem& problem);

}  // namespace fa4::aten
