// The planner for the tests, without torch and without a GPU. It is not part of the wheel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "../aten/strides.h"
#include "../core/plan/plan.h"
#include "../core/plan/problem_features.h"
#include "../core/plan/speed_rules.h"

namespace py = pybind11;
using namespace fa4;

namespace {

Range range(std::pair<int64_t, int64_t> bounds) { return {bounds.first, bounds.second}; }

}  // namespace

PYBIND11_MODULE(fa4_core, m) {
  py::enum_<Op>(m, "Op")
      .value("FORWARD", Op::kForward)
      .value("DECODE", Op::kDecode)
      .value("BACKWARD", Op::kBackward)
      .value("BACKWARD_GROUPS", Op::kBackwardGroups)
      .value("BACKWARD_QUERIES", Op::kBackwardQueries)
      .value("BACKWARD_KEYS", Op::kBackwardKeys)
      .value("MAP_QUERIES", Op::kMapQueries)
      .value("MAP_KEYS", Op::kMapKeys)
      .value("PREPROCESS", Op::kPreprocess)
      .value("POSTPROCESS", Op::kPostprocess)
      .value("CLEAR", Op::kClear);
  py::enum_<Decode>(m, "Decode")
      .value("WHERE_FASTER", Decode::kWhereFaster)
      .value("WHERE_POSSIBLE", Decode::kWherePossible)
      .value("WHERE_NEEDED", Decode::kWhereNeeded);
  py::enum_<Dtype>(m, "Dtype").value("BF16", Dtype::kBf16).value("FP16", Dtype::kFp16);
  py::enum_<Layout>(m, "Layout")
      .value("DENSE", Layout::kDense)
      .value("VARLEN", Layout::kVarlen)
      .value("PAGED", Layout::kPaged)
      .value("ANY", Layout::kAny);
  py::enum_<Mask>(m, "Mask")
      .value("FULL", Mask::kFull)
      .value("CAUSAL", Mask::kCausalBottomRight)
      .value("WINDOW", Mask::kWindow)
      .value("BIAS", Mask::kBias);
  py::enum_<Peer>(m, "Peer")
      .value("FLASH", Peer::kFlash)
      .value("CUDNN", Peer::kCudnn)
      .value("EFFICIENT", Peer::kEfficient);

  py::class_<Tile>(m, "Tile")
      .def(py::init([](int queries, int keys) { return Tile{queries, keys}; }))
      .def_readonly("queries", &Tile::queries)
      .def_readonly("keys", &Tile::keys);
  py::class_<TileSchedule>(m, "TileSchedule").def(py::init([](int num_ctas, int paired_heads) {
    return TileSchedule{num_ctas, paired_heads};
  }));
  py::class_<KernelSet>(m, "KernelSet").def(py::init([](const std::vector<std::string>& patterns) {
    KernelSet set;
    for (const std::string& pattern : patterns) {
      if (!set.add(pattern)) throw py::value_error("no kernel matches " + pattern);
    }
    return set;
  }));
  py::class_<Overrides>(m, "Overrides")
      .def(py::init([](Tile tile, TileSchedule schedule, Decode decode) {
             return Overrides{tile, schedule, decode};
           }),
           py::kw_only(), py::arg("tile") = Tile(), py::arg("schedule") = TileSchedule(),
           py::arg("decode") = Decode::kWhereFaster);

  py::class_<Problem>(m, "Problem")
      .def(py::init<>())
      .def_readwrite("op", &Problem::op)
      .def_readwrite("capability", &Problem::capability)
      .def_readwrite("sm_count", &Problem::sm_count)
      .def_readwrite("dtype", &Problem::dtype)
      .def_readwrite("layout", &Problem::layout)
      .def_readwrite("batch", &Problem::batch)
      .def_readwrite("seqlen_q", &Problem::seqlen_q)
      .def_readwrite("seqlen_k", &Problem::seqlen_k)
      .def_readwrite("longest_is_zero", &Problem::longest_is_zero)
      .def_readwrite("total_q", &Problem::total_q)
      .def_readwrite("total_k", &Problem::total_k)
      .def_readwrite("num_heads", &Problem::num_heads)
      .def_readwrite("num_heads_kv", &Problem::num_heads_kv)
      .def_readwrite("head_dim", &Problem::head_dim)
      .def_readwrite("head_dim_v", &Problem::head_dim_v)
      .def_readwrite("is_causal", &Problem::is_causal)
      .def_readwrite("causal_top_left", &Problem::causal_top_left)
      .def_readwrite("window_size_left", &Problem::window_size_left)
      .def_readwrite("window_size_right", &Problem::window_size_right)
      .def_readwrite("deterministic", &Problem::deterministic)
      .def_readwrite("peer", &Problem::peer)
      .def_readwrite("page_size", &Problem::page_size)
      .def_readwrite("pages_in_rows", &Problem::pages_in_rows)
      .def_readwrite("keys_in_use", &Problem::keys_in_use)
      .def_readwrite("num_splits", &Problem::num_splits)
      .def_readwrite("bias", &Problem::bias)
      .def_readwrite("bias_batch", &Problem::bias_batch)
      .def_readwrite("bias_heads", &Problem::bias_heads)
      .def_readwrite("bias_by_query", &Problem::bias_by_query)
      .def_readwrite("bias_suits_cudnn", &Problem::bias_suits_cudnn);

  py::class_<Kernel>(m, "Kernel")
      .def_readonly("name", &Kernel::name)
      .def_readonly("op", &Kernel::op)
      .def_readonly("arch", &Kernel::arch)
      .def_readonly("dtype", &Kernel::dtype)
      .def_readonly("head_dim", &Kernel::head_dim)
      .def_readonly("head_dim_v", &Kernel::head_dim_v)
      .def_readonly("layout", &Kernel::layout)
      .def_readonly("mask", &Kernel::mask)
      .def_readonly("grouped", &Kernel::grouped)
      .def_readonly("deterministic", &Kernel::deterministic)
      .def_readonly("two_cta", &Kernel::two_cta)
      .def_readonly("persistent", &Kernel::persistent)
      .def_readonly("tuned", &Kernel::tuned)
      .def_readonly("block_m", &Kernel::block_m)
      .def_readonly("block_n", &Kernel::block_n)
      .def_readonly("ctas_per_sm", &Kernel::ctas_per_sm)
      .def_readonly("preprocess", &Kernel::preprocess)
      .def_readonly("postprocess_dq", &Kernel::postprocess_dq)
      .def_readonly("postprocess_dk", &Kernel::postprocess_dk)
      .def_readonly("postprocess_dv", &Kernel::postprocess_dv)
      .def_readonly("map_queries", &Kernel::map_queries)
      .def_readonly("map_keys", &Kernel::map_keys);

  py::class_<TileRule>(m, "TileRule")
      .def(py::init([](Op op, Layout layout, int16_t head_dim, Mask mask,
                       std::pair<int64_t, int64_t> queries, std::pair<int64_t, int64_t> rows,
                       std::pair<int64_t, int64_t> tiles, Tile tile, bool beats_stock) {
        constexpr Range any{0, kMax};
        const Rule where{op, layout,         head_dim, mask, {},          {},
                         {}, range(queries), any,      any,  range(rows), range(tiles)};
        return TileRule{where, tile, beats_stock};
      }));

  py::class_<Rule>(m, "SpeedRule")
      .def(py::init([](Op op, Layout layout, int16_t head_dim, std::optional<Mask> mask,
                       std::optional<bool> grouped, std::optional<int16_t> head_dim_v,
                       std::optional<Peer> peer, std::pair<int64_t, int64_t> queries,
                       std::pair<int64_t, int64_t> keys, std::pair<int64_t, int64_t> batch) {
        constexpr Range any{0, kMax};
        return Rule{op,   layout,         head_dim,    mask,         grouped, head_dim_v,
                    peer, range(queries), range(keys), range(batch), any,     any};
      }));

  py::class_<Workspace>(m, "Workspace")
      .def_readonly("rows_q", &Workspace::rows_q)
      .def_readonly("rows_k", &Workspace::rows_k)
      .def_readonly("numbers_in_dq", &Workspace::numbers_in_dq)
      .def_readonly("lse_log2", &Workspace::lse_log2)
      .def_readonly("delta", &Workspace::delta)
      .def_readonly("dq_accum", &Workspace::dq_accum)
      .def_readonly("zeroed", &Workspace::zeroed)
      .def_readonly("dk_accum", &Workspace::dk_accum)
      .def_readonly("dv_accum", &Workspace::dv_accum)
      .def_readonly("dq_semaphore", &Workspace::dq_semaphore)
      .def_readonly("dk_semaphore", &Workspace::dk_semaphore)
      .def_readonly("dv_semaphore", &Workspace::dv_semaphore)
      .def_readonly("tiles_q", &Workspace::tiles_q)
      .def_readonly("tiles_k", &Workspace::tiles_k)
      .def_readonly("cluster", &Workspace::cluster)
      .def_readonly("cells", &Workspace::cells)
      .def_readonly("lists_q", &Workspace::lists_q)
      .def_readonly("lists_k", &Workspace::lists_k)
      .def_readonly("bytes", &Workspace::bytes);

  py::class_<Plan>(m, "Plan")
      .def_property_readonly("supported", &Plan::supported)
      .def_property_readonly(
          "kernel", [](const Plan& plan) { return plan.kernel; },
          py::return_value_policy::reference)
      .def_readonly("window_size_left", &Plan::window_size_left)
      .def_readonly("window_size_right", &Plan::window_size_right)
      .def_readonly("splits", &Plan::splits)
      .def_readonly("heads_together", &Plan::heads_together)
      .def_property_readonly("num_ctas", [](const Plan& plan) { return plan.schedule.num_ctas; })
      .def_property_readonly("paired_heads",
                             [](const Plan& plan) { return plan.schedule.paired_heads; })
      .def_readonly("workspace", &Plan::workspace)
      .def_readonly("nothing_to_compute", &Plan::nothing_to_compute)
      .def_readonly("stock_is_faster", &Plan::stock_is_faster)
      .def_property_readonly("reason", [](const Plan& plan) { return plan.reason.value_or(""); });

  m.def("plan", &plan, py::arg("problem"), py::arg("speed_rules") = true,
        py::arg("overrides") = Overrides(), py::arg("tile_rules") = kTileRules,
        py::arg("disabled") = KernelSet());
  // The reason by which these speed rules leave a problem to its peer, or None.
  m.def("stock_is_faster", [](const Problem& problem, const std::vector<Rule>& rules) {
    const Kernel* kernel = plan(problem, false).kernel;
    return kernel ? stock_is_faster(problem, *kernel, features(problem, *kernel), rules) : nullptr;
  });
  m.def(
      "kernels",
      [] {
        std::vector<const Kernel*> rows;
        for (int32_t i = 0; i < kNumKernels; ++i) rows.push_back(&kKernels[i]);
        return rows;
      },
      py::return_value_policy::reference);
  m.def("empty_like_strides",
        [](const std::vector<int64_t>& size, const std::vector<int64_t>& stride) {
          std::vector<int64_t> result(size.size());
          empty_like_strides(static_cast<int64_t>(size.size()), size.data(), stride.data(),
                             result.data());
          return result;
        });
  m.def("output_strides",
        [](const std::vector<int64_t>& size, const std::vector<int64_t>& query_stride) {
          std::vector<int64_t> result(size.size());
          output_strides(static_cast<int64_t>(size.size()), size.data(), query_stride.data(),
                         result.data());
          return result;
        });
  m.attr("UNBOUNDED") = kUnbounded;
}
