// From a row of logits to a row of the block mask, by one warp.
#pragma once

#include "pbs/bitmask.h"
#include "top_mass.cuh"
#include "walk.cuh"

namespace pbs::cuda {

// The permuted key block that holds token 0.
__device__ inline int find_sink(const SelectArgs& args, const SelectTile& tile) {
  const Problem& problem = args.params.problem;
  if (args.params.perm == nullptr) return 0;
  const int64_t hp = tile.hq / (problem.num_q_heads / problem.num_perm_heads);
  const int32_t* perm = args.params.perm + (tile.b * problem.num_perm_heads + hp) * problem.num_kv;
  const auto size = static_cast<int>(smaller(args.params.blocking.segment_size, problem.num_kv));
  int place = 0;
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x) % 32; i < size; i += 32) {
    if (perm[i] == 0) place = i;
  }
  return __reduce_max_sync(~0u, place) / static_cast<int>(args.params.blocking.kv_block_size);
}

// Logits of the own segment's key blocks behind those of the candidates. Returns how many there are
// in all.
__device__ inline int add_own_logits(const SelectArgs& args, const SelectTile& tile,
                                     const QueryBlock& block, const SplitQueries& q_means, int row,
                                     float* logits) {
  const Problem& problem = args.params.problem;
  const int head_dim = static_cast<int>(problem.head_dim);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t hkv = tile.hq / (problem.num_q_heads / problem.num_kv_heads);
  const float* own_means =
      args.own_means + (tile.b * problem.num_kv_heads + hkv) * args.num_kv_blocks * head_dim;
  const int64_t first = block.own_begin / args.params.blocking.kv_block_size;
  const int64_t last = ceil_div(block.own_end, args.params.blocking.kv_block_size);
  auto n = static_cast<int>(block.num_candidates);
  for (int64_t j = first; j < last; ++j, ++n) {
    float sum = 0.0f;
    for (int d = lane; d < head_dim; d += 32) {
      sum += q_means.read(row, d) * own_means[j * head_dim + d];
    }
    sum = warp_sum(sum);
    if (lane == 0) logits[n] = sum;
  }
  __syncwarp();
  return n;
}

// The cut of a row. Leaves weights of candidates in `logits`.
__device__ inline Cut cut_row(const SelectArgs& args, const SelectTile& tile,
                              const QueryBlock& block, const SplitQueries& q_means, int row,
                              float* logits, uint32_t* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto num_candidates = static_cast<int>(block.num_candidates);
  const int n = args.params.is_mass_causal ? add_own_logits(args, tile, block, q_means, row, logits)
                                           : num_candidates;
  const float total = weigh(logits, n);
  float own = 0.0f;
  for (int i = num_candidates + lane; i < n; i += 32) {
    own += logits[i];
    logits[i] = 0.0f;
  }
  __syncwarp();
  // With a NaN among the inputs no order means anything: visit everything, as dense would.
  if (args.params.threshold >= 1.0 || !(total >= 0.0f)) return Cut{0, num_candidates, true};
  const float needed = static_cast<float>(args.params.threshold) * total - warp_sum(own);
  const float of_candidates =
      n == num_candidates ? total : lane_part_from(logits, num_candidates, 1).over_lanes().mass;
  return find_cut(logits, num_candidates, of_candidates, needed, scratch);
}

// Sets the bits of a row, and counts them.
__device__ inline void write_row(const SelectArgs& args, int64_t row, int num_candidates, int sink,
                                 const float* weights, const Cut& cut) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t* words = args.params.block_mask + row * args.num_words;
  int num_equal = 0;
  int count = 0;
  for (int first = 0; first < args.num_words; first += 32) {
    uint32_t own_word = 0;  // of the lane's place
    const int num_words = min(32, (num_candidates + 31) / 32 - first);
#pragma unroll 4
    for (int w = 0; w < num_words; ++w) {
      const int i = (first + w) * 32 + lane;
      const uint32_t weight = i < num_candidates ? __float_as_uint(weights[i]) : 0;
      bool is_selected = weight >= cut.weight;
      if (!cut.takes_all_equal) {
        const bool is_equal = i < num_candidates && weight == cut.weight;
        const uint32_t equal = __ballot_sync(~0u, is_equal);
        const int rank = num_equal + __popc(equal & ((1u << lane) - 1));
        if (is_equal && rank >= cut.num_equal) is_selected = false;
        num_equal += __popc(equal);
      }
      const uint32_t word = __ballot_sync(~0u, i < num_candidates && (is_selected || i == sink));
      if (lane == w) own_word = word;
    }
    if (first + lane < args.num_words) words[first + lane] = own_word;
    count += __popc(own_word);
  }
  count = __reduce_add_sync(~0u, count);
  if (lane == 0) args.params.counts[row] = count;
}

}  // namespace pbs::cuda
