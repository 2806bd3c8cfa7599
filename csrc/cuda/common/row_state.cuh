// What is known of one query's weights, and how such states merge.
#pragma once

#include "common/exp2.cuh"

namespace pbs::cuda {

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

}  // namespace pbs::cuda
