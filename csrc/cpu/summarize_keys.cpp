// select_blocks with score="sampled", before its first half: what the samples look at instead of
// every permuted key (kSummaryKeys), once for all query blocks and heads that read it.
#include "pbs/geometry.h"
#include "simd.h"
#include "stages.h"

namespace pbs::cpu::PBS_CPU_ARCH {
namespace {

void mean_of_rows(const float* rows, int64_t stride, int64_t head_dim, float* mean) {
  static_assert(kPoolSize == 4, "added in pairs");
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const float* column = rows + d;
    const Vec first = load(column) + load(column + stride);
    const Vec second = load(column + 2 * stride) + load(column + 3 * stride);
    store(mean + d, (first + second) * (1.0f / kPoolSize));
  }
}

}  // namespace

int64_t summarize_scratch(const SelectBlocksParams& params) {
  return kPoolSize * params.problem.head_dim;
}

void summarize_keys(const SelectBlocksParams& params, const KeySummary& summary, int64_t item,
                    float* scratch) {
  const Problem& problem = params.problem;
  const int64_t head_dim = problem.head_dim;
  const int64_t head = item / summary.num_windows;
  const int64_t hp = head % problem.num_perm_heads;
  const int64_t b = head / problem.num_perm_heads;
  const int64_t begin = item % summary.num_windows * kSummaryKeys;
  const int64_t end = smaller(begin + kSummaryKeys, summary.num_rows);
  float* keys = summary.keys + item * kSummaryColumns * head_dim;
  int64_t stride = 0;
  for (int64_t row = begin; row < begin + kExactKeys; ++row, keys += head_dim) {
    const float* key = float_rows(params.k_perm, problem, b, hp, row, 1, scratch, &stride);
    std::memcpy(keys, key, head_dim * sizeof(float));
  }
  for (int64_t row = begin + kExactKeys; row < end; row += kPoolSize, keys += head_dim) {
    const float* rows = float_rows(params.k_perm, problem, b, hp, row, kPoolSize, scratch, &stride);
    mean_of_rows(rows, stride, head_dim, keys);
  }
}

}  // namespace pbs::cpu::PBS_CPU_ARCH
