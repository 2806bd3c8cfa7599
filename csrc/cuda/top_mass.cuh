// The smallest set of shares that reaches a mass, by one warp.
#pragma once

#include <cstdint>

#include "exp2.cuh"

namespace pbs::cuda {

__device__ inline float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Logits in powers of two to shares of their softmax, by one warp.
__device__ inline void softmax_base2(float* logits, int n) {
  const int lane = threadIdx.x % 32;
  float top = -INFINITY;
  for (int i = lane; i < n; i += 32) top = fmaxf(top, logits[i]);
  top = warp_max(top);
  float total = 0.0f;
  for (int i = lane; i < n; i += 32) {
    logits[i] = exp2_approx(logits[i] - top);
    total += logits[i];
  }
  const float inverse = 1.0f / warp_sum(total);
  for (int i = lane; i < n; i += 32) logits[i] *= inverse;
  __syncwarp();
}

// What belongs to the smallest set that reaches a mass: every candidate above a share, and of those
// that equal it the first few.
struct Cut {
  uint32_t share;  // as bits, which order like the floats: no share is negative
  int num_equal;
};

// Candidates at or above a share.
struct Part {
  float mass;
  int count;
};

__device__ inline Part part_from(const float* shares, int n, uint32_t share) {
  float mass = 0.0f;
  int count = 0;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < n; i += 32) {
    const float own = shares[i];
    const bool is_in = __float_as_uint(own) >= share;
    mass += is_in ? own : 0.0f;
    count += is_in;
  }
  return Part{warp_sum(mass), __reduce_add_sync(~0u, count)};
}

// The largest share below another.
__device__ inline uint32_t largest_below(const float* shares, int n, uint32_t share) {
  uint32_t largest = 0;
  for (int i = threadIdx.x % 32; i < n; i += 32) {
    const uint32_t own = __float_as_uint(shares[i]);
    if (own < share && own > largest) largest = own;
  }
  return __reduce_max_sync(~0u, largest);
}

// The smallest set of candidates with a mass of at least `needed`, by one warp: bisection over the
// bits of a share until one candidate is left, without a sort.
__device__ inline Cut find_cut(const float* shares, int n, float needed) {
  constexpr uint32_t kAboveAll = 0x7f800000;
  if (needed <= 0.0f) return Cut{kAboveAll, 0};
  // At or above `low` there is enough, at or above `high` there is not.
  uint32_t low = 0;
  Part from_low = part_from(shares, n, low);
  if (from_low.mass < needed) return Cut{0, n};
  uint32_t high = largest_below(shares, n, kAboveAll) + 1;
  Part from_high{0.0f, 0};
  while (high - low > 1) {
    if (from_low.count - from_high.count == 1) return Cut{largest_below(shares, n, high), 1};
    const uint32_t middle = low + (high - low) / 2;
    const Part from_middle = part_from(shares, n, middle);
    if (from_middle.mass >= needed) {
      low = middle;
      from_low = from_middle;
    } else {
      high = middle;
      from_high = from_middle;
    }
  }
  float reached = from_high.mass;
  int num_equal = 0;
  while (reached < needed && num_equal < n) {
    reached += __uint_as_float(low);
    ++num_equal;
  }
  return Cut{low, num_equal};
}

}  // namespace pbs::cuda
