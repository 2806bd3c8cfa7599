// Turns a row of weights and its cut into a row of the block mask, in one warp.
#pragma once

#include "pbs/bitmask.h"
#include "pbs/params.h"
#include "top_mass.cuh"

namespace pbs::cuda {

// Sets the bits of a row and counts them. Candidates from num_scored on are always visited.
__device__ inline void write_row(const SelectBlocksParams& params, int num_words, int64_t row,
                                 int num_scored, int num_candidates, int sink, const float* weights,
                                 const Cut& cut) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t* words = params.block_mask + row * num_words;
  int num_equal = 0;
  int count = 0;
  for (int first = 0; first < num_words; first += 32) {
    uint32_t own_word = 0;  // the word at the lane's place
    const int num_filled = min(32, (num_candidates + 31) / 32 - first);
#pragma unroll 4
    for (int w = 0; w < num_filled; ++w) {
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
      const bool is_visited = is_selected || i == sink || i >= num_scored;
      const uint32_t word = __ballot_sync(~0u, i < num_candidates && is_visited);
      if (lane == w) own_word = word;
    }
    if (first + lane < num_words) words[first + lane] = own_word;
    count += __popc(own_word);
  }
  count = __reduce_add_sync(~0u, count);
  if (lane == 0) params.counts[row] = count;
}

}  // namespace pbs::cuda
