// Softmax states of queries, one for each part of the keys.
#pragma once

#include "common/score_keys/part_states.cuh"
#include "key_parts.cuh"

namespace pbs::cuda::sm90 {

// Returns the states of all queries of a head (b * num_q_heads + hq), one part after the other.
__device__ inline float2* row_states(const ScoreArgs& args, int64_t head) {
  return args.state + head * args.num_states * kScoreTileRows;
}

}  // namespace pbs::cuda::sm90
