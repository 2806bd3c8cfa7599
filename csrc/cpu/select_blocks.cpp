// select_blocks, first half: the softmax mass of every key block that a block of queries may visit.
#include "pbs/geometry.h"
#include "simd.h"
#include "stages.h"

namespace pbs::cpu::PBS_CPU_ARCH {
namespace {

constexpr float kNegInf = -__builtin_huge_valf();

// The mean of rows [begin, end) of one head. `buffer` (D) is used for inputs that are not float32.
void mean_rows(const ConstRows& rows, const Problem& problem, int64_t b, int64_t h, int64_t begin,
               int64_t end, float* buffer, float* mean) {
  for (int64_t d = 0; d < problem.head_dim; ++d) mean[d] = 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    int64_t stride = 0;
    const float* src = float_rows(rows, problem, b, h, row, 1, buffer, &stride);
    for (int64_t d = 0; d < problem.head_dim; ++d) mean[d] += src[d];
  }
  const float share = 1.0f / static_cast<float>(end - begin);
  for (int64_t d = 0; d < problem.head_dim; ++d) mean[d] *= share;
}

float dot(const float* a, const float* b, int64_t n) {
  Vec total{};
  for (int64_t i = 0; i < n; i += kLanes) total += load(a + i) * load(b + i);
  return sum(total);
}

void softmax_base2(float* logits, int64_t n) {
  float top = kNegInf;
  for (int64_t i = 0; i < n; ++i) top = logits[i] > top ? logits[i] : top;
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    logits[i] = __builtin_exp2f(logits[i] - top);
    total += logits[i];
  }
  const float inverse = static_cast<float>(1.0 / total);
  for (int64_t i = 0; i < n; ++i) logits[i] *= inverse;
}

}  // namespace

int64_t mean_scratch(const SelectBlocksParams& params) { return 3 * params.problem.head_dim; }

void mean_mass(const SelectBlocksParams& params, const QueryBlock& block, const SelectItem& item,
               float* mass, float* scratch) {
  const int64_t b = item.b, hq = item.first_head;
  const Problem& problem = params.problem;
  const Blocking& blocking = params.blocking;
  const int64_t hp = hq / heads_per_perm(problem);
  const int64_t hkv = hq / heads_per_kv(problem);
  float* q_mean = scratch;
  float* own_mean = q_mean + problem.head_dim;
  float* buffer = own_mean + problem.head_dim;
  mean_rows(params.q, problem, b, hq, block.first_row, block.first_row + block.num_rows, buffer,
            q_mean);
  const float factor = params.scale * kLog2e;
  const float* k_mean = params.k_mean + (b * problem.num_perm_heads + hp) *
                                            num_key_blocks(problem, blocking) * problem.head_dim;
  for (int64_t j = 0; j < block.num_candidates; ++j) {
    mass[j] = factor * dot(q_mean, k_mean + j * problem.head_dim, problem.head_dim);
  }
  int64_t num_entries = block.num_candidates;
  if (counts_own_mass(params.rule)) {
    for (int64_t begin = block.own_begin; begin < block.own_end; begin += blocking.kv_block_size) {
      const int64_t end = smaller(begin + blocking.kv_block_size, problem.num_kv);
      mean_rows(params.k, problem, b, hkv, begin, end, buffer, own_mean);
      mass[num_entries++] = factor * dot(q_mean, own_mean, problem.head_dim);
    }
  }
  softmax_base2(mass, num_entries);
}

int64_t select_scratch(const SelectBlocksParams& params) {
  switch (params.rule.score) {
    case Score::kMean:
      return num_mass_entries(params) + mean_scratch(params);
    case Score::kSampled:
      return num_mass_entries(params) + sampled_scratch(params);
  }
  __builtin_unreachable();
}

void block_mass(const SelectBlocksParams& params, int64_t item_idx, float* scratch) {
  const SelectItem item = select_item(params, item_idx);
  const QueryBlock block =
      query_block(item.q_block_idx, params.problem, params.blocking, params.is_causal);
  if (!needs_mass(params, block)) return;
  float* rest = scratch + num_mass_entries(params);
  switch (params.rule.score) {
    case Score::kMean:
      return mean_mass(params, block, item, scratch, rest);
    case Score::kSampled:
      return sampled_mass(params, block, item, scratch, rest);
  }
}

}  // namespace pbs::cpu::PBS_CPU_ARCH
