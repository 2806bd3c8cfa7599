// Finds the smallest set of weights that reaches a mass, in one warp. Rows of weights start at a
// multiple of 16 bytes, and are padded with zeros to a multiple of four.
#pragma once

#include <cstdint>

#include "common/exp2.cuh"
#include "common/warp_sums.cuh"
#include "pbs/select_rows.h"

namespace pbs::cuda {

// Calls body(values, i) for every four values of a row that this lane reads.
template <class Body>
__device__ void for_each_four(float* row, int n, Body body) {
#pragma unroll 4
  for (int i = 4 * (threadIdx.x % 32); i < n; i += 128) {
    body(*reinterpret_cast<float4*>(row + i), i);
  }
}

// Turns logits, in powers of two, into weights relative to the largest. Returns their sum, which is
// NaN if a logit is NaN or infinite.
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

// The smallest set that reaches a mass: every weight above a limit, and the first few of those that
// equal it.
struct Cut {
  uint32_t weight;  // as bits, which have the order of the floats, as no weight is negative
  int num_equal;    // how many of these to take
  bool takes_all_equal;
};

// The number and the sum of the weights at or above a limit, in a lane or a warp.
struct Part {
  float mass = 0.0f;
  int count = 0;

  // Written as three instructions: the compiler makes five of it.
  __device__ void add(float x, uint32_t least) {
    asm("{\n"
        ".reg .pred is_in;\n"
        "setp.ge.u32 is_in, %2, %3;\n"
        "@is_in add.f32 %0, %0, %4;\n"
        "@is_in add.s32 %1, %1, 1;\n"
        "}"
        : "+f"(mass), "+r"(count)
        : "r"(__float_as_uint(x)), "r"(least), "f"(x));
  }
  __device__ void add(const Part& other) {
    mass += other.mass;
    count += other.count;
  }
  __device__ Part over_lanes() const { return Part{warp_sum(mass), __reduce_add_sync(~0u, count)}; }
};

// The share of this lane. The padding zeros count if `least` is 0.
__device__ inline Part lane_part_from(float* weights, int n, uint32_t least) {
  Part parts[2];
  for_each_four(weights, n, [&](const float4& x, int) {
    parts[0].add(x.x, least);
    parts[1].add(x.y, least);
    parts[0].add(x.z, least);
    parts[1].add(x.w, least);
  });
  parts[0].add(parts[1]);
  return parts[0];
}

// A range of weights that contains the cut: the weights at or above `low` reach the mass, those at
// or above `high` do not.
class CutRange {
 public:
  __device__ explicit CutRange(const Part& all) : from_low_(all) {}

  __device__ uint32_t low() const { return low_; }
  __device__ uint32_t high() const { return high_; }
  __device__ const Part& from_high() const { return from_high_; }
  __device__ int num_between() const { return from_low_.count - from_high_.count; }
  __device__ bool holds_one_value() const { return high_ - low_ <= 1; }

  // Divides the range at the mean, which few weights of a typical long tail exceed. From the
  // seventh division on, every second one is at the middle, so that the search ends for any
  // weights.
  __device__ uint32_t middle() {
    const float mean =
        __fdividef(from_low_.mass - from_high_.mass, static_cast<float>(num_between()));
    const uint32_t bits = __float_as_uint(mean);
    const bool is_usable =
        bits > low_ && bits < high_ && (++num_divided_ <= 6 || num_divided_ % 2 == 0);
    return is_usable ? bits : low_ + (high_ - low_) / 2;
  }

  // Returns whether the weights from `middle` on reach the mass.
  __device__ bool divide(uint32_t middle, const Part& from_middle, float needed) {
    const bool is_enough = from_middle.mass >= needed;
    if (is_enough) {
      low_ = middle;
      from_low_ = from_middle;
    } else {
      high_ = middle;
      from_high_ = from_middle;
    }
    return is_enough;
  }

 private:
  uint32_t low_ = 0;
  uint32_t high_ = 0x3f800001;  // just above 1, the largest weight
  Part from_low_;
  Part from_high_;
  int num_divided_ = 0;
};

constexpr int kKeptPerLane = kCutScratch / 32;

// The weights in a range, at most kCutScratch, without padding. Weight i of them is kept[i / 32] of
// lane i % 32.
struct KeptWeights {
  float kept[kKeptPerLane];
  int count;

  // `before` of them belong to lower lanes.
  __device__ KeptWeights(float* weights, int n, const CutRange& range, int before,
                         uint32_t* scratch)
      : count(range.num_between()) {
    const uint32_t low = range.low();
    const uint32_t size = range.high() - low;
    int place = before;
    const auto keep = [&](float x) {
      if (__float_as_uint(x) - low < size) scratch[place++] = __float_as_uint(x);
    };
    __syncwarp();
    for_each_four(weights, n, [&](const float4& x, int) {
      keep(x.x);
      keep(x.y);
      keep(x.z);
      keep(x.w);
    });
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kKeptPerLane; ++i) {
      kept[i] = lane + 32 * i < count ? __uint_as_float(scratch[lane + 32 * i]) : 0.0f;
    }
  }

  // Requires least > 0.
  __device__ Part lane_part_from(uint32_t least) const {
    Part part;
#pragma unroll
    for (float x : kept) part.add(x, least);
    return part;
  }
};

// Sorts the values of the lanes in descending order.
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

// Finds the cut in a range of at most 32 weights.
__device__ inline Cut cut_few(const KeptWeights& weights, const CutRange& range, float needed,
                              uint32_t* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int count = range.num_between();
  int num_found = 0;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kKeptPerLane; ++i) {
    const uint32_t bits = __float_as_uint(weights.kept[i]);
    const bool is_between =
        lane + 32 * i < weights.count && bits - range.low() < range.high() - range.low();
    const uint32_t votes = __ballot_sync(~0u, is_between);
    if (is_between) scratch[num_found + __popc(votes & ((1u << lane) - 1))] = bits;
    num_found += __popc(votes);
  }
  __syncwarp();
  const uint32_t sorted = sort_lanes(lane < count ? scratch[lane] : 0);
  const float reached = sum_up_to(lane == 0 ? range.from_high().mass + __uint_as_float(sorted)
                                            : __uint_as_float(sorted));
  // The last weight counts even if rounding keeps the sum of all below the mass.
  const uint32_t enough = __ballot_sync(~0u, lane < count && reached >= needed) | 1u << (count - 1);
  const int last = __ffs(enough) - 1;
  const uint32_t weight = __shfl_sync(~0u, sorted, last);
  const uint32_t equal = __ballot_sync(~0u, lane < count && sorted == weight);
  const int num_equal = __popc(equal & ((2u << last) - 1));
  return Cut{weight, num_equal, num_equal == __popc(equal)};
}

// The smallest set of n weights, of sum `total`, with a mass of at least `needed`. It does not sort
// all weights: it divides the range of the cut until the weights in it fit in registers, and then
// until each lane can hold one. Runs in one warp with kCutScratch words of shared memory.
__device__ inline Cut find_cut(float* weights, int n, float total, float needed,
                               uint32_t* scratch) {
  constexpr uint32_t kAboveAll = 0x7f800000;
  if (needed <= 0.0f) return Cut{kAboveAll, 0, true};
  if (total < needed) return Cut{0, n, true};
  const int lane = static_cast<int>(threadIdx.x) % 32;
  CutRange range(Part{total, (n + 3) / 4 * 4});
  int lane_low = (n - 4 * lane + 127) / 128 * 4;
  int lane_high = 0;
  while (range.num_between() > kCutScratch && !range.holds_one_value()) {
    const uint32_t middle = range.middle();
    const Part own = lane_part_from(weights, n, middle);
    (range.divide(middle, own.over_lanes(), needed) ? lane_low : lane_high) = own.count;
  }
  if (!range.holds_one_value()) {
    const int num_own = lane_low - lane_high;
    const int num_before = sum_up_to(num_own) - num_own;
    const KeptWeights kept(weights, n, range, num_before, scratch);
    const Part above = range.from_high();
    while (range.num_between() > 32 && !range.holds_one_value()) {
      const uint32_t middle = range.middle();
      Part from_middle = kept.lane_part_from(middle).over_lanes();
      from_middle.add(above);
      range.divide(middle, from_middle, needed);
    }
    // Two sums of the same weights, with different rounding.
    if (range.num_between() == 0) return Cut{range.low(), 0, true};
    if (range.num_between() <= 32) return cut_few(kept, range, needed, scratch);
  }
  float reached = range.from_high().mass;
  int num_equal = 0;
  while (reached < needed && num_equal < n) {
    reached += __uint_as_float(range.low());
    ++num_equal;
  }
  return Cut{range.low(), num_equal, num_equal == range.num_between()};
}

}  // namespace pbs::cuda
