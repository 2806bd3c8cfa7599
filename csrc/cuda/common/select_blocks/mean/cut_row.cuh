// Computes the cut of a row of logits, in one warp.
#pragma once

#include "mean_args.cuh"
#include "top_mass.cuh"

namespace pbs::cuda {

// Appends the logits of the own segment's key blocks to those of the candidates. Returns the total
// number.
template <class ReadMean>
__device__ int add_own_logits(const MeanArgs& args, const SelectTile& tile, const QueryBlock& block,
                              const ReadMean& q_mean, float* logits) {
  const Problem& problem = args.params.problem;
  const int head_dim = static_cast<int>(problem.head_dim);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t hkv = tile.hq / heads_per_kv(problem);
  const float* own_means =
      args.own_means + (tile.b * problem.num_kv_heads + hkv) * args.num_kv_blocks * head_dim;
  const int64_t first = block.own_begin / args.params.blocking.kv_block_size;
  const int64_t last = ceil_div(block.own_end, args.params.blocking.kv_block_size);
  auto n = static_cast<int>(block.num_candidates);
  for (int64_t j = first; j < last; ++j, ++n) {
    float sum = 0.0f;
    for (int d = lane; d < head_dim; d += 32) {
      sum += q_mean(d) * own_means[j * head_dim + d];
    }
    sum = warp_sum(sum);
    if (lane == 0) logits[n] = sum;
  }
  __syncwarp();
  return n;
}

// The cut of a row whose mean query has the elements q_mean(d). Replaces the logits of candidates
// by their weights.
template <class ReadMean>
__device__ Cut cut_row(const MeanArgs& args, const SelectTile& tile, const QueryBlock& block,
                       const ReadMean& q_mean, float* logits, uint32_t* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto num_candidates = static_cast<int>(block.num_candidates);
  const int n = counts_own_mass(args.params.rule)
                    ? add_own_logits(args, tile, block, q_mean, logits)
                    : num_candidates;
  const float total = weigh(logits, n);
  float own = 0.0f;
  for (int i = num_candidates + lane; i < n; i += 32) {
    own += logits[i];
    logits[i] = 0.0f;
  }
  __syncwarp();
  // With NaN among the inputs no order is meaningful: visit everything, as dense attention would.
  if (args.params.rule.threshold >= 1.0 || !(total >= 0.0f)) return Cut{0, num_candidates, true};
  const float needed = static_cast<float>(args.params.rule.threshold) * total - warp_sum(own);
  const float of_candidates =
      n == num_candidates ? total : lane_part_from(logits, num_candidates, 1).over_lanes().mass;
  return find_cut(logits, num_candidates, of_candidates, needed, scratch);
}

}  // namespace pbs::cuda
