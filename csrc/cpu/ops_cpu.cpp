// The CPU backend: spreads the items of each stage over torch's threads.
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"
#include "stage_ops.h"

namespace pbs {
namespace {

// Calls body(item, scratch) for every item, in ascending order as threads become free.
template <class Body>
void for_each_item(int64_t num_items, int64_t scratch_floats, const Body& body) {
  if (num_items <= 0) return;
  const int64_t num_workers =
      smaller(static_cast<int64_t>(torch::stable::get_num_threads()), num_items);
  constexpr std::align_val_t kLine{64};
  const int64_t floats_per_worker = ceil_div(scratch_floats, 16) * 16;
  const std::unique_ptr<float, void (*)(float*)> scratch(
      static_cast<float*>(::operator new(
          static_cast<size_t>(num_workers * floats_per_worker + 16) * sizeof(float), kLine)),
      [](float* p) { ::operator delete(p, kLine); });
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      float* own = scratch.get() + worker * floats_per_worker;
      for (int64_t item = next++; item < num_items; item = next++) body(item, own);
    }
  });
}

struct CpuBackend {
  static void require(const char*, const Tensor&) {}
  static void check_attention(const Tensor&, const Tensor&, const Tensor&, float, const Problem&,
                              const Blocking&, int64_t) {}

  static void score_keys(ScoreKeysParams& params, const Tensor& like) {
    const Problem& problem = params.problem;
    std::memset(params.importance, 0,
                problem.batch * problem.num_perm_heads * problem.num_kv * sizeof(float));
    const int64_t num_scored = round_down(problem.num_kv, params.blocking.segment_size);
    const int64_t num_rows = num_score_rows(problem, params.blocking);
    const int64_t num_chunks = ceil_div(num_scored, cpu::kScoreChunk);
    if (num_rows == 0 || num_chunks == 0) return;
    const Tensor state = StageOps<CpuBackend>::new_tensor(
        like, {2, problem.batch, problem.num_q_heads, num_chunks, num_rows}, ScalarType::Float);
    params.row_max = state.mutable_data_ptr<float>();
    params.row_sum = params.row_max + state.numel() / 2;

    const cpu::Kernels& kernels = cpu::kernels();
    const int64_t scratch = kernels.score_scratch(params);
    const auto run = [&](auto kernel, int64_t num_items) {
      for_each_item(num_items, scratch,
                    [&](int64_t item, float* own) { kernel(params, item, own); });
    };
    run(kernels.score_chunk, problem.batch * problem.num_q_heads * num_chunks);
    run(kernels.score_merge, problem.batch * problem.num_q_heads);
    run(kernels.score_average, problem.batch * problem.num_perm_heads * num_chunks);
  }

  static void sort_segments(const SortSegmentsParams& params, const Tensor&) {
    const int64_t num_segments = ceil_div(params.num_kv, params.segment_size);
    for_each_item(params.num_heads * num_segments, 0,
                  [&](int64_t item, float*) { cpu::sort_segment(params, item); });
  }

  static void permute_kv(const PermuteKVParams& params, const Tensor&) {
    const Problem& problem = params.problem;
    const int64_t num_heads = problem.batch * problem.num_perm_heads;
    check_perm_range(params.perm, num_heads * problem.num_kv, problem.num_kv);
    const cpu::Kernels& kernels = cpu::kernels();
    for_each_item(num_heads * num_copied_blocks(params), kernels.permute_scratch(params),
                  [&](int64_t item, float* own) { kernels.permute_block(params, item, own); });
  }

  static void select_blocks(const SelectBlocksParams& params, const Tensor&) {
    const Problem& problem = params.problem;
    const cpu::Kernels& kernels = cpu::kernels();
    for_each_item(
        problem.batch * problem.num_q_heads * ceil_div(problem.num_q, params.blocking.block_size),
        kernels.select_scratch(params), [&](int64_t item, float* own) {
          kernels.block_mass(params, item, own);
          cpu::select_top_mass(params, item, own);
        });
  }

  static void attend(const AttendParams& params, const Tensor&) {
    const Problem& problem = params.problem;
    const cpu::Kernels& kernels = cpu::kernels();
    for_each_item(
        problem.batch * problem.num_q_heads * ceil_div(problem.num_q, params.blocking.block_size),
        kernels.attend_scratch(params),
        [&](int64_t item, float* own) { kernels.attend_block(params, item, own); });
  }

  static void check_perm_range(const int32_t* perm, int64_t n, int64_t num_kv) {
    for (int64_t i = 0; i < n; ++i) {
      if (perm[i] < 0 || perm[i] >= num_kv) {
        fail("perm must hold key rows from 0 to ", num_kv - 1, ", got ", perm[i]);
      }
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pbs, CPU, m) { StageOps<CpuBackend>::register_all(m); }

}  // namespace pbs
