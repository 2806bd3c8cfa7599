// The states of queries that parts of the keys have left.
#pragma once

#include "common/row_state.cuh"
#include "key_parts.cuh"

namespace pbs::cuda::sm90 {

// Points to the states of all queries of a head (b * num_q_heads + hq), one part after the other.
__device__ inline float2* row_states(const ScoreArgs& args, int64_t head) {
  return args.state + head * args.num_states * kScoreTileRows;
}

// What one query's states of every step-th part come to.
__device__ inline RowState merge_parts(const float2* states, int num_parts, int step) {
  RowState all;
#pragma unroll 8
  for (int p = 0; p < num_parts; p += step) {
    const float2 state = states[p * kScoreTileRows];
    all = merge(all, RowState{state.x, state.y});
  }
  return all;
}

}  // namespace pbs::cuda::sm90
