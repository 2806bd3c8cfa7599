// The smallest set of weights that reaches a mass, by one warp. Rows of weights start at a multiple
// of 16 bytes, and where their number is no multiple of four, zeros follow.
#pragma once

#include <cstdint>

#include "../exp2.cuh"

namespace pbs::cuda {

__device__ inline float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Calls body(values, i) for each four values of a row that this lane takes.
template <class Body>
__device__ void for_each_four(float* row, int n, Body body) {
#pragma unroll 4
  for (int i = 4 * (threadIdx.x % 32); i < n; i += 128) {
    body(*reinterpret_cast<float4*>(row + i), i);
  }
}

// Logits in powers of two to weights relative to the largest. Returns their sum; NaN where a logit
// is NaN or infinite.
__device__ inline float weigh(float* logits, int n) {
  const int lane = threadIdx.x % 32;
  if (n % 4 != 0 && lane < 4 - n % 4) logits[n + lane] = -INFINITY;
  __syncwarp();
  float top = -INFINITY;
  for_each_four(logits, n, [&](const float4& x, int) {
    top = fmaxf(top, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
  });
  top = warp_max(top);
  float total = 0.0f;
  for_each_four(logits, n, [&](float4& x, int) {
    x = float4{exp2_approx(x.x - top), exp2_approx(x.y - top), exp2_approx(x.z - top),
               exp2_approx(x.w - top)};
    total += (x.x + x.y) + (x.z + x.w);
  });
  __syncwarp();
  return warp_sum(total);
}

// What belongs to the smallest set that reaches a mass: every weight above one, and of those that
// equal it the first few.
struct Cut {
  uint32_t weight;  // as bits, which order like the floats: no weight is negative
  int num_equal;    // to take
  bool takes_all_equal;
};

// Weights at or above one.
struct Part {
  float mass;
  int count;
};

// least > 0.
__device__ inline Part part_from(float* weights, int n, uint32_t least) {
  float mass[2] = {};
  int count = 0;
  const auto add = [&](float x, float& sum) {
    if (__float_as_uint(x) >= least) {
      sum += x;
      ++count;
    }
  };
  for_each_four(weights, n, [&](const float4& x, int) {
    add(x.x, mass[0]);
    add(x.y, mass[1]);
    add(x.z, mass[0]);
    add(x.w, mass[1]);
  });
  return Part{warp_sum(mass[0] + mass[1]), __reduce_add_sync(~0u, count)};
}

// The values of the lanes in descending order.
__device__ inline uint32_t sort_lanes(uint32_t x) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int run = 2; run <= 32; run *= 2) {
#pragma unroll
    for (int distance = run / 2; distance > 0; distance /= 2) {
      const uint32_t other = __shfl_xor_sync(~0u, x, distance);
      const bool takes_larger = ((lane & distance) == 0) == ((lane & run) == 0);
      x = takes_larger ? max(x, other) : min(x, other);
    }
  }
  return x;
}

// Where the cut lies among the weights in [low, high), of which there are `count`, at most 32, when
// those from `high` on weigh `mass`.
__device__ inline Cut cut_few(float* weights, int n, uint32_t low, uint32_t high, int count,
                              float mass, float needed, uint32_t* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t lanes_before = (1u << lane) - 1;
  int num_found = 0;
  const auto keep = [&](float x, bool exists) {
    const uint32_t bits = __float_as_uint(x);
    const bool is_between = exists && bits >= low && bits < high;
    const uint32_t votes = __ballot_sync(~0u, is_between);
    const int place = num_found + __popc(votes & lanes_before);
    if (is_between && place < 32) scratch[place] = bits;
    num_found += __popc(votes);
  };
  __syncwarp();
  for (int first = 0; first < n; first += 128) {  // all lanes vote
    const int i = first + 4 * lane;
    float4 x{};
    if (i < n) x = *reinterpret_cast<const float4*>(weights + i);
    keep(x.x, i < n);
    keep(x.y, i + 1 < n);
    keep(x.z, i + 2 < n);
    keep(x.w, i + 3 < n);
  }
  __syncwarp();
  const uint32_t sorted = sort_lanes(lane < count ? scratch[lane] : 0);
  float reached = lane == 0 ? mass + __uint_as_float(sorted) : __uint_as_float(sorted);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float before = __shfl_up_sync(~0u, reached, step);
    if (lane >= step) reached += before;
  }
  // The last one, too, where rounding makes the sum of all fall short.
  const uint32_t enough = __ballot_sync(~0u, lane < count && reached >= needed) | 1u << (count - 1);
  const int last = __ffs(enough) - 1;
  const uint32_t weight = __shfl_sync(~0u, sorted, last);
  const uint32_t equal = __ballot_sync(~0u, lane < count && sorted == weight);
  const int num_equal = __popc(equal & ((2u << last) - 1));
  return Cut{weight, num_equal, num_equal == __popc(equal)};
}

// The smallest set of n weights, of sum `total`, with a mass of at least `needed`: bisection over
// the bits of a weight until a lane can hold each of those between the bounds, without a sort of
// them all. By one warp with 32 words of shared memory.
__device__ inline Cut find_cut(float* weights, int n, float total, float needed,
                               uint32_t* scratch) {
  constexpr uint32_t kAboveAll = 0x7f800000;
  if (needed <= 0.0f) return Cut{kAboveAll, 0, true};
  if (total < needed) return Cut{0, n, true};
  // At or above `low` there is enough, at or above `high` there is not.
  uint32_t low = 0;
  uint32_t high = __float_as_uint(1.0f) + 1;  // the largest weight is 1
  Part from_low{total, n};
  Part from_high{0.0f, 0};
  // All weights below this one could be left out, but for rounding.
  uint32_t middle = __float_as_uint((total - needed) / static_cast<float>(n));
  while (high - low > 1) {
    const int num_between = from_low.count - from_high.count;
    if (num_between == 0) return Cut{low, 0, true};  // two sums of the same, rounded differently
    if (num_between <= 32) {
      return cut_few(weights, n, low, high, num_between, from_high.mass, needed, scratch);
    }
    if (middle <= low || middle >= high) middle = low + (high - low) / 2;
    const Part from_middle = part_from(weights, n, middle);
    if (from_middle.mass >= needed) {
      low = middle;
      from_low = from_middle;
    } else {
      high = middle;
      from_high = from_middle;
    }
    middle = low;
  }
  float reached = from_high.mass;
  int num_equal = 0;
  while (reached < needed && num_equal < n) {
    reached += __uint_as_float(low);
    ++num_equal;
  }
  return Cut{low, num_equal, num_equal == from_low.count - from_high.count};
}

}  // namespace pbs::cuda
