// Exposes the header-only parts to tests/test_native.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "pbs/arch.h"
#include "pbs/bitmask.h"
#include "pbs/driver.h"
#include "pbs/geometry.h"
#include "pbs/key_tiles.h"
#include "pbs/sm80/sampled_tiles.h"
#include "pbs/sm80/score_parts.h"
#include "pbs/sm80/select_tiles.h"
#include "pbs/sm80/tile_shape.h"
#include "pbs/sm90/sampled_tiles.h"
#include "pbs/sm90/score_parts.h"
#include "pbs/sm90/select_tiles.h"
#include "pbs/sm90/tile_shape.h"
#include "pbs/work_order.h"
#include "simd.h"

namespace py = pybind11;
namespace cpu = pbs::cpu::native_test;
namespace sm80 = pbs::cuda::sm80;
namespace sm90 = pbs::cuda::sm90;

// Params of select_blocks with mean scores, with as many queries as keys.
static pbs::SelectBlocksParams select_params(int64_t num_heads, int64_t num_tokens,
                                             int64_t head_dim, bool is_float, int64_t block_size,
                                             int64_t kv_block_size, int64_t segment_size) {
  pbs::SelectBlocksParams params{};
  params.problem.batch = 1;
  params.problem.num_q_heads = num_heads;
  params.problem.num_q = num_tokens;
  params.problem.num_kv = num_tokens;
  params.problem.head_dim = head_dim;
  params.problem.dtype = is_float ? pbs::DType::kFloat32 : pbs::DType::kFloat16;
  params.blocking = pbs::Blocking{block_size, kv_block_size, segment_size};
  return params;
}

// The index of the number of multiprocessors among the arguments of sampled_plan.
static constexpr size_t kNumSms = 13;

static pbs::SelectBlocksParams sampled_params(const py::args& args) {
  const auto size = [&](size_t i) { return args[i].cast<int64_t>(); };
  pbs::SelectBlocksParams params{};
  params.problem = pbs::Problem{size(0), size(1), size(2), size(3),
                                size(4), size(5), size(6), pbs::DType::kBFloat16};
  params.blocking = pbs::Blocking{size(7), size(8), size(9)};
  params.is_causal = args[10].cast<bool>();
  params.rule.num_samples = args[11].cast<int32_t>();
  params.rule.shares_heads = args[12].cast<bool>();
  return params;
}

PYBIND11_MODULE(pbs_native, m) {
  py::class_<pbs::QueryBlock>(m, "QueryBlock")
      .def_readonly("first_row", &pbs::QueryBlock::first_row)
      .def_readonly("num_rows", &pbs::QueryBlock::num_rows)
      .def_readonly("first_position", &pbs::QueryBlock::first_position)
      .def_readonly("own_begin", &pbs::QueryBlock::own_begin)
      .def_readonly("own_end", &pbs::QueryBlock::own_end)
      .def_readonly("num_candidates", &pbs::QueryBlock::num_candidates);
  m.def("query_block",
        static_cast<decltype(pbs::query_block(0, 0, 0, 1, 1, 1, true)) (*)(
            int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool)>(&pbs::query_block));
  py::class_<pbs::KeyTiles>(m, "KeyTiles")
      .def_readonly("num_own", &pbs::KeyTiles::num_own)
      .def_readonly("total", &pbs::KeyTiles::total)
      .def_readonly("num_masked", &pbs::KeyTiles::num_masked)
      .def_readonly("first_selected_size", &pbs::KeyTiles::first_selected_size);
  m.def("key_tiles", &pbs::key_tiles);
  m.def("own_tile_begin", &pbs::own_tile_begin);
  m.def("visible_keys", &pbs::visible_keys);
  // Tiles of `chunks_per_tile` <= 4 rows, newest first. The first tile takes first_chunks.
  m.def("pack", [](const std::vector<int32_t>& rows, int32_t first_chunks, int32_t chunks_per_tile,
                   int32_t chunk_rows) {
    pbs::TilePacker<4> packer{};
    packer.begin(first_chunks, chunk_rows);
    std::vector<std::vector<int32_t>> tiles;
    for (const int32_t row : rows) {
      if (packer.add(row, chunks_per_tile)) {
        tiles.emplace_back(packer.rows, packer.rows + chunks_per_tile);
      }
    }
    return tiles;
  });
  m.def("tile_keys", &sm90::tile_keys);
  m.def("tile_bytes", &sm90::tile_bytes);
  m.def("stages", [](int head_dim) {
    return std::make_tuple(sm90::q_stages(head_dim), sm90::k_stages(head_dim),
                           sm90::v_stages(head_dim));
  });
  m.attr("shared_bytes_per_cta") = sm90::kSharedBytesPerCta;
  m.attr("swizzle_bytes") = sm90::kSwizzleBytes;
  py::class_<pbs::WorkGroups>(m, "WorkGroups")
      .def(py::init(&pbs::work_groups))
      .def_readonly("heads_per_group", &pbs::WorkGroups::heads_per_group)
      .def("num_groups", &pbs::WorkGroups::num_groups)
      .def("blocks_per_group", &pbs::WorkGroups::blocks_per_group);
  m.def("work_tile", [](const pbs::WorkGroups& groups, int32_t group_idx, int32_t block_idx) {
    const pbs::WorkTile tile = pbs::work_tile(groups, group_idx, block_idx);
    return std::make_pair(tile.head, tile.q_block_idx);
  });
  m.def("drawn_place", [](const pbs::WorkGroups& groups, int32_t draw_idx) {
    const pbs::DrawnPlace drawn = pbs::drawn_place(groups, draw_idx);
    return std::make_pair(drawn.rank, drawn.place);
  });
  m.attr("order_bins") = pbs::kOrderBins;
  m.def("order_bin", &pbs::order_bin);
  m.def("order_layout", [](const pbs::WorkGroups& groups) {
    const pbs::OrderLayout layout = pbs::order_layout(groups);
    return std::vector<int64_t>{layout.counter,  layout.sorted,  layout.unsorted,
                                layout.group_at, layout.weights, layout.size};
  });
  py::class_<sm90::ScorePlan>(m, "ScorePlan")
      .def_readonly("heads_per_group", &sm90::ScorePlan::heads_per_group)
      .def_readonly("num_groups", &sm90::ScorePlan::num_groups)
      .def_readonly("keys_per_part", &sm90::ScorePlan::keys_per_part)
      .def_readonly("num_parts", &sm90::ScorePlan::num_parts)
      .def_readonly("num_stages", &sm90::ScorePlan::num_stages);
  m.def("score_plan", &sm90::score_plan);
  m.def("score_shared_bytes", &sm90::score_shared_bytes);
  m.def("score_stage_rows", &sm90::score_stage_rows);
  m.def("blocks_per_warpgroup", &sm90::blocks_per_warpgroup);
  m.attr("score_warpgroups") = sm90::kScoreWarpgroups;
  py::class_<sm80::ScoreParts>(m, "ScoreParts")
      .def_readonly("keys_per_part", &sm80::ScoreParts::keys_per_part)
      .def_readonly("num_parts", &sm80::ScoreParts::num_parts);
  m.def("score_parts", &sm80::score_parts);
  // Returns the rows of a stage, the number of stages, and the bytes of shared memory.
  m.def("score_ring", [](int head_dim) {
    return std::make_tuple(sm80::score_stage_rows(head_dim), sm80::score_stages(head_dim),
                           sm80::score_shared_bytes(head_dim));
  });
  m.attr("score_ctas_per_sm") = sm80::kScoreCtasPerSm;
  py::class_<sm90::SelectTiles>(m, "SelectTiles")
      .def_readonly("rows", &sm90::SelectTiles::rows)
      .def_readonly("num_slots", &sm90::SelectTiles::num_slots)
      .def_readonly("shared_bytes", &sm90::SelectTiles::shared_bytes);
  // These also return the largest number of key blocks that fit.
  m.def("select_tiles", [](int64_t num_heads, int64_t num_tokens, int64_t head_dim, bool is_float,
                           int64_t block_size, int64_t kv_block_size, int64_t segment_size) {
    const auto params = select_params(num_heads, num_tokens, head_dim, is_float, block_size,
                                      kv_block_size, segment_size);
    return std::make_pair(sm90::select_tiles(params, 132),
                          sm90::max_key_blocks(params.problem, params.blocking));
  });
  m.attr("logit_rows") = sm90::kLogitRows;
  py::class_<sm80::SelectTiles>(m, "SelectTilesSm80")
      .def_readonly("rows", &sm80::SelectTiles::rows)
      .def_readonly("shared_bytes", &sm80::SelectTiles::shared_bytes);
  m.def("select_tiles_sm80",
        [](int64_t num_heads, int64_t num_tokens, int64_t head_dim, bool is_float,
           int64_t block_size, int64_t kv_block_size, int64_t segment_size, int64_t num_sms,
           int64_t shared_bytes_per_sm) {
          const auto params = select_params(num_heads, num_tokens, head_dim, is_float, block_size,
                                            kv_block_size, segment_size);
          return std::make_pair(sm80::select_tiles(params, num_sms, shared_bytes_per_sm),
                                sm80::max_key_blocks(params.problem, params.blocking));
        });
  m.attr("logit_rows_sm80") = sm80::kLogitRows;
  m.attr("small_shared_bytes_per_cta") = sm80::kSmallSharedBytesPerCta;
  py::class_<pbs::cuda::SampledPlan>(m, "SampledPlan")
      .def_readonly("rows_per_pair", &pbs::cuda::SampledPlan::rows_per_pair)
      .def_readonly("pairs_per_stack", &pbs::cuda::SampledPlan::pairs_per_stack)
      .def_readonly("stacks_per_unit", &pbs::cuda::SampledPlan::stacks_per_unit)
      .def_readonly("selections_per_perm", &pbs::cuda::SampledPlan::selections_per_perm)
      .def_readonly("pairs_per_perm", &pbs::cuda::SampledPlan::pairs_per_perm)
      .def_readonly("stacks_per_perm", &pbs::cuda::SampledPlan::stacks_per_perm)
      .def_readonly("units_per_perm", &pbs::cuda::SampledPlan::units_per_perm)
      .def_readonly("num_perm_heads", &pbs::cuda::SampledPlan::num_perm_heads)
      .def_readonly("heads_per_group", &pbs::cuda::SampledPlan::heads_per_group)
      .def_readonly("key_parts", &pbs::cuda::SampledPlan::key_parts)
      .def_readonly("num_ctas", &pbs::cuda::SampledPlan::num_ctas)
      .def_readonly("num_tiles", &pbs::cuda::SampledPlan::num_tiles)
      .def_readonly("head_dim", &pbs::cuda::SampledPlan::head_dim);
  m.def("sampled_plan", [](py::args args) {
    return sm90::sampled_plan(sampled_params(args), args[kNumSms].cast<int64_t>());
  });
  m.def("sampled_plan_sm80", [](py::args args) {
    return sm80::sampled_plan(sampled_params(args), args[kNumSms].cast<int64_t>());
  });
  // Returns where the parts of the workspace begin, in order, and where the last one ends.
  const auto ends = [](const pbs::cuda::SampledWorkspace& at) {
    return std::vector<int64_t>{at.key_tiles, at.stacks, at.rows, at.tables, at.counter, at.end};
  };
  m.def("sampled_workspace",
        [ends](const pbs::cuda::SampledPlan& plan) { return ends(sm90::sampled_workspace(plan)); });
  m.def("sampled_workspace_sm80",
        [ends](const pbs::cuda::SampledPlan& plan) { return ends(sm80::sampled_workspace(plan)); });
  m.def("table_bytes", &pbs::cuda::table_bytes);
  m.def("key_tile_bytes", &sm90::key_tile_bytes);
  m.def("stack_bytes", &sm90::stack_bytes);
  m.def("sampled_key_stages", &sm90::sampled_key_stages);
  m.attr("stack_rows") = pbs::cuda::kStackRows;
  m.attr("sampled_keys") = pbs::cuda::kSampledKeys;
  m.attr("sum_keys") = pbs::cuda::kSumKeys;
  m.attr("tiles_per_read") = pbs::cuda::kTilesPerRead;
  m.attr("sums_per_read") = pbs::cuda::kSumsPerRead;
  m.attr("sampled_row_bytes") = sizeof(pbs::cuda::SampledRow);
  m.attr("drawn_units") = sm90::kDrawnUnits;
  m.attr("sampled_tables") = sm90::kSampledTables;
  m.attr("sum_warpgroups") = sm90::kSumWarpgroups;
  m.attr("stacks_per_unit") =
      std::make_tuple(pbs::cuda::kFewestStacks, pbs::cuda::kFewStacks, pbs::cuda::kManyStacks);
  // Returns how many candidates of a query block are selected by score, and whether the block is in
  // the dense tail.
  m.def("scored_blocks", [](int64_t q_block_idx, int64_t num_q, int64_t num_kv, int64_t block_size,
                            int64_t kv_block_size, int64_t segment_size, bool is_causal,
                            int64_t window, int64_t dense_tail) {
    pbs::Problem problem{};
    problem.num_q = num_q;
    problem.num_kv = num_kv;
    const pbs::Blocking blocking{block_size, kv_block_size, segment_size};
    pbs::SelectRule rule{};
    rule.window = window;
    rule.dense_tail = dense_tail;
    const pbs::QueryBlock block = pbs::query_block(q_block_idx, problem, blocking, is_causal);
    return std::make_pair(pbs::num_scored_blocks(block, problem, blocking, rule, is_causal),
                          pbs::is_in_dense_tail(block, problem, rule, is_causal));
  });
  m.def("capability_error", &pbs::capability_error);
  m.def("driver_error", &pbs::driver_error);
  m.def("selected", [](const std::vector<uint32_t>& words, int64_t num_candidates) {
    std::vector<int64_t> blocks;
    pbs::for_each_selected(words.data(), num_candidates,
                           [&](int64_t block_idx) { blocks.push_back(block_idx); });
    return blocks;
  });
  m.def("exp2", [](float x) { return cpu::exp2_nonpositive(cpu::splat(x))[0]; });
  m.def("half_to_float", &cpu::half_to_float);
  m.def("float_to_half", &cpu::float_to_half);
  m.def("float_to_bfloat16", &cpu::float_to_bfloat16);
}
