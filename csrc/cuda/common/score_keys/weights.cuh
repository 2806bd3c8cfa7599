// Weights of keys, computed from products whose rows are keys and whose columns are queries.
#pragma once

#include <cute/tensor.hpp>

#include "common/fragments.cuh"
#include "common/row_state.cuh"

namespace pbs::cuda {

// A weight is exp2(score + shift). A query whose scores are all -inf has weights of 0, like one
// that does not exist.
__device__ inline float shift_of(const RowState& query, bool exists) {
  return exists && query.sum != 0.0f ? -(query.max + log2f(query.sum)) : -INFINITY;
}

// The position of a query's shift among those of its head. The columns of a thread in two products
// of 8 are contiguous.
__device__ inline int place_of_shift(int query) {
  return query / 16 * 16 + query % 8 / 2 * 4 + query % 16 / 8 * 2 + query % 2;
}

// Adds the weights in a thread's columns to those of its keys. `shifts` are those of the columns.
template <class Scores>
__device__ void add_weights(const Scores& scores, const float* shifts, float factor, int lane,
                            float (&totals)[kThreadRows]) {
  float sums[kThreadRows][2] = {};
  CUTE_UNROLL
  for (int i = 0; i < cute::size(scores); i += 8) {
    const float4 four = *reinterpret_cast<const float4*>(shifts + i * 2 + lane % 4 * 4);
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      sums[r][0] += exp2_approx(scores(i + 2 * r) * factor + four.x);
      sums[r][1] += exp2_approx(scores(i + 2 * r + 1) * factor + four.y);
      sums[r][0] += exp2_approx(scores(i + 4 + 2 * r) * factor + four.z);
      sums[r][1] += exp2_approx(scores(i + 4 + 2 * r + 1) * factor + four.w);
    }
  }
  CUTE_UNROLL
  for (int r = 0; r < kThreadRows; ++r) totals[r] += sums[r][0] + sums[r][1];
}

}  // namespace pbs::cuda
