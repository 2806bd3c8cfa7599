// What is known of one query's weights, and how such states merge.
#pragma once

#include "common/exp2.cuh"
#include "key_parts.cuh"

namespace pbs::cuda::sm90 {

// The sum of exp2(score - max) over some keys of one query. `max` is not always their maximum, but
// near enough to it that the sum is a number.
struct RowState {
  float max = -INFINITY;
  float sum = 0.0f;
};

__device__ inline RowState merge(const RowState& a, const RowState& b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return RowState{max, a.sum + b.sum};  // NaN stays NaN
  return RowState{max, a.sum * exp2_approx(a.max - max) + b.sum * exp2_approx(b.max - max)};
}

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
