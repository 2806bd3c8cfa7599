// permute_kv: gathers K and V rows of one permuted key block, and averages its keys if the means
// are needed.
#include "pbs/geometry.h"
#include "simd.h"
#include "stages.h"

namespace pbs::cpu::PBS_CPU_ARCH {

int64_t permute_scratch(const PermuteKVParams& params) { return params.problem.head_dim; }

void permute_block(const PermuteKVParams& params, int64_t item, float* scratch) {
  const Problem& problem = params.problem;
  const int64_t head_dim = problem.head_dim;
  const int64_t num_kv_blocks = ceil_div(problem.num_kv, params.kv_block_size);
  const int64_t kv_block_idx = item % num_copied_blocks(params);
  const int64_t head = item / num_copied_blocks(params);
  const int64_t b = head / problem.num_perm_heads;
  const int64_t hp = head % problem.num_perm_heads;
  const int64_t hkv = hp / (problem.num_perm_heads / problem.num_kv_heads);
  const int64_t begin = kv_block_idx * params.kv_block_size;
  const int64_t end = smaller(begin + params.kv_block_size, params.num_copied);

  const int64_t size = element_size(problem.dtype);
  const int64_t k_head = b * params.k.batch_stride + hkv * params.k.head_stride;
  const int64_t v_head = b * params.v.batch_stride + hkv * params.v.head_stride;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t src = params.perm[head * problem.num_kv + row];
    const RowPlace place = place_of(params.pages, b, params.first_page_row + row);
    const void* key = offset(params.k.data, k_head + src * params.k.row_stride, problem.dtype);
    const void* value = offset(params.v.data, v_head + src * params.v.row_stride, problem.dtype);
    const auto copy = [&](const MutableRows& to, const void* from) {
      std::memcpy(static_cast<char*>(to.data) + size * row_start(to, place, hp), from,
                  size * head_dim);
    };
    copy(params.k_perm, key);
    copy(params.v_perm, value);
  }
  if (params.k_mean == nullptr) return;
  float* mean = params.k_mean + (head * num_kv_blocks + kv_block_idx) * head_dim;
  for (int64_t d = 0; d < head_dim; ++d) mean[d] = 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t src = params.perm[head * problem.num_kv + row];
    const void* key = offset(params.k.data, k_head + src * params.k.row_stride, problem.dtype);
    to_floats(key, problem.dtype, scratch, head_dim);
    for (int64_t d = 0; d < head_dim; ++d) mean[d] += scratch[d];
  }
  const float share = 1.0f / static_cast<float>(end - begin);
  for (int64_t d = 0; d < head_dim; ++d) mean[d] *= share;
}

}  // namespace pbs::cpu::PBS_CPU_ARCH
