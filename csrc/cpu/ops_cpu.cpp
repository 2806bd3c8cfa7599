// The CPU backend: distributes the items of each stage over the threads of torch.
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"
#include "sequence_ops.h"

namespace pbs {
namespace {

// Calls body(item, scratch) for every item. Threads take items in ascending order.
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

int64_t num_block_items(const Problem& problem, const Blocking& blocking) {
  return problem.batch * problem.num_q_heads * num_query_blocks(problem, blocking);
}

// The CPU accepts everything that the checks of all backends accept.
class CpuBackend {
 public:
  CpuBackend(const char*, const char* name, const Tensor& t) { check_defined(name, t); }

  static void check_score_keys(const ScoreKeysParams&) {}
  static void check_sort_segments(const SortSegmentsParams&) {}
  static void check_permute_kv(const PermuteKVParams& params) {
    const Problem& problem = params.problem;
    const int64_t n = problem.batch * problem.num_perm_heads * problem.num_kv;
    for (int64_t i = 0; i < n; ++i) {
      if (params.perm[i] < 0 || params.perm[i] >= problem.num_kv) {
        fail("perm must hold key rows from 0 to ", problem.num_kv - 1, ", got ", params.perm[i]);
      }
    }
  }
  static void check_select_blocks(const SelectBlocksParams&) {}
  static void check_attend(const AttendParams&) {}
  static void check_attention(const Operands&, const OperandNames&, const Problem&, const Blocking&,
                              float, const SelectRule&) {}

  static void check_aligned_rows(const char*, const ConstRows&, DType) {}

  static void score_keys(const ScoreKeysParams& params) {
    const Problem& problem = params.problem;
    std::memset(params.importance, 0,
                problem.batch * problem.num_perm_heads * problem.num_kv * sizeof(float));
    const int64_t num_scored = num_scored_keys(params);
    const int64_t num_rows = num_score_rows(problem, params.blocking);
    const int64_t num_chunks = ceil_div(num_scored, cpu::kScoreChunk);
    if (num_rows == 0 || num_chunks == 0) return;
    const int64_t num_states = problem.batch * problem.num_q_heads * num_chunks * num_rows;
    const std::unique_ptr<float[]> memory(new float[2 * num_states]);
    const cpu::ScoreStates states{memory.get(), memory.get() + num_states};
    const cpu::Kernels& kernels = cpu::kernels();
    const int64_t scratch = kernels.score_scratch(params);
    const auto run = [&](auto kernel, int64_t num_items) {
      for_each_item(num_items, scratch,
                    [&](int64_t item, float* own) { kernel(params, states, item, own); });
    };
    run(kernels.score_chunk, problem.batch * problem.num_q_heads * num_chunks);
    run(kernels.score_merge, problem.batch * problem.num_q_heads);
    run(kernels.score_average, problem.batch * problem.num_perm_heads * num_chunks);
  }

  static void sort_segments(const SortSegmentsParams& params) {
    const int64_t num_segments = ceil_div(params.num_kv, params.segment_size);
    for_each_item(params.num_heads * num_segments, 0,
                  [&](int64_t item, float*) { cpu::sort_segment(params, item); });
  }

  static void permute_kv(const PermuteKVParams& params) {
    const int64_t num_heads = params.problem.batch * params.problem.num_perm_heads;
    const cpu::Kernels& kernels = cpu::kernels();
    for_each_item(num_heads * num_copied_blocks(params), kernels.permute_scratch(params),
                  [&](int64_t item, float* own) { kernels.permute_block(params, item, own); });
  }

  static void copy_pages(const CopyPagesParams& params) {
    for_each_item(params.num_heads * params.num_rows, 0,
                  [&](int64_t item, float*) { cpu::copy_page_row(params, item); });
  }

  static void select_blocks(const SelectBlocksParams& params) {
    const cpu::Kernels& kernels = cpu::kernels();
    for_each_item(cpu::num_select_items(params), kernels.select_scratch(params),
                  [&](int64_t item, float* own) {
                    kernels.block_mass(params, item, own);
                    cpu::select_top_mass(params, item, own);
                  });
  }

  static void attend(const AttendParams& params) {
    const cpu::Kernels& kernels = cpu::kernels();
    for_each_item(num_block_items(params.problem, params.blocking), kernels.attend_scratch(params),
                  [&](int64_t item, float* own) { kernels.attend_block(params, item, own); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pbs, CPU, m) {
  StageOps<CpuBackend>::register_all(m);
  SequenceOps<CpuBackend>::register_all(m);
}

}  // namespace pbs
