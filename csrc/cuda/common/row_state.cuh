// The state of the softmax of one query, and how two states merge.
#pragma once

#include "common/exp2.cuh"

namespace pbs::cuda {

// The sum of exp2(score - max) over some keys of one query. `max` need not be their exact maximum,
// but it is close enough to keep the sum finite.
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
