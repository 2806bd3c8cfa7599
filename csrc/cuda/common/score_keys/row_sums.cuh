// The sum of the weights of a query, computed tile by tile.
#pragma once

#include <cute/tensor.hpp>

#include "common/exp2.cuh"
#include "common/fragments.cuh"

namespace pbs::cuda {

// The state of a thread for its two rows of a product, over its own columns only.
struct alignas(16) ThreadState {
  float sum[kThreadRows];
  float max[kThreadRows];
};
static_assert(sizeof(ThreadState) == 16);

// Sums are relative to the maximum of the first tile. Nothing is rounded on the way, so a later
// score may exceed it by 126 powers of two. If a score is even larger, the weights of the tile are
// computed again, relative to its own maximum.
class RowSums {
 public:
  __device__ explicit RowSums(float factor) : factor_(factor) {}

  template <class Scores>
  __device__ void add(const Scores& scores, bool is_first, ThreadState& state) const {
    float sums[kThreadRows];
    bool is_lost = is_first;
    if (!is_first) {
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) {
        sums[r] = state.sum[r] + weigh(scores, r, state.max[r]);
        is_lost |= !(sums[r] < INFINITY);
      }
    }
    if (__any_sync(~0u, is_lost)) {
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) {
        const float max = fmaxf(state.max[r], maximum(scores, r) * factor_);
        const float shift = shift_of(max);
        sums[r] = state.sum[r] * exp2_approx(state.max[r] - shift) + weigh(scores, r, shift);
        state.max[r] = max;
      }
    }
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) state.sum[r] = sums[r];
  }

 private:
  // If all scores are -inf: the weights are 0, or NaN if a score is NaN.
  __device__ static float shift_of(float max) { return max == -INFINITY ? 0.0f : max; }

  template <class Scores>
  __device__ float weigh(const Scores& scores, int r, float shift) const {
    float sums[2] = {};
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      if (row_of(i) == r) sums[i % 2] += exp2_approx(scores(i) * factor_ - shift);
    }
    return sums[0] + sums[1];
  }

  template <class Scores>
  __device__ static float maximum(const Scores& scores, int r) {
    float top = -INFINITY;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      if (row_of(i) == r) top = fmaxf(top, scores(i));
    }
    return top;
  }

  float factor_;
};

}  // namespace pbs::cuda
