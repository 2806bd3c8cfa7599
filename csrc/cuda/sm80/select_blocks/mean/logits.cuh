// Logits of a few query blocks against all key blocks, in float32.
//
// The lanes of a quad share their keys, and each has a quarter of the dimensions. A warp then reads
// whole sectors of keys, which come from L2, and reads mean queries without bank conflicts.
#pragma once

#include <cstdint>

#include "common/fragments.cuh"
#include "pbs/sm80/select_tiles.h"

namespace pbs::cuda::sm80 {

constexpr int kKeysPerLane = 4;
constexpr int kKeysPerWarp = 8 * kKeysPerLane;
constexpr int kDimsPerStep = 16;  // per quad
constexpr int kStepsAtOnce = 2;   // steps whose keys are loaded together

// Where the keys of a lane are, starting with its first dimensions. Keys past the end repeat the
// last one.
template <int kHeadDim>
struct KeyRows {
  const float* k_means;
  int offsets[kKeysPerLane];

  __device__ KeyRows(const float* k_means, int first, int num_keys) : k_means(k_means) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const int key = min(first + lane / 4 + 8 * i, num_keys - 1);
      offsets[i] = key * kHeadDim + lane % 4 * 4;
    }
  }

  // Loads the keys of the steps from `step` on.
  __device__ void load(int step, float4 (&keys)[kStepsAtOnce][kKeysPerLane]) const {
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const float* from = k_means + offsets[i] + step * kDimsPerStep;
#pragma unroll
      for (int s = 0; s < kStepsAtOnce; ++s) {
        keys[s][i] = __ldg(reinterpret_cast<const float4*>(from + s * kDimsPerStep));
      }
    }
  }
};

// Sums over the lanes of a quad. Each lane gets the sum of one key, key_of_lane().
template <int kRows>
__device__ void add_over_quad(const float (&sums)[kKeysPerLane][kRows], float (&totals)[kRows]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool takes_second = lane % 2 != 0;
  const bool takes_odd = lane / 2 % 2 != 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float halves[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float given = takes_second ? sums[i][r] : sums[i + 2][r];
      const float kept = takes_second ? sums[i + 2][r] : sums[i][r];
      halves[i] = kept + __shfl_xor_sync(~0u, given, 1);
    }
    const float given = takes_odd ? halves[0] : halves[1];
    const float kept = takes_odd ? halves[1] : halves[0];
    totals[r] = kept + __shfl_xor_sync(~0u, given, 2);
  }
}
__device__ inline int key_of_lane() {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return lane / 4 + 8 * (lane % 2 * 2 + lane / 2 % 2);
}

// Adds the products of a step's dimensions.
template <int kHeadDim, int kRows>
__device__ void add_step(const float4 (&keys)[kKeysPerLane], const float* q_means, int step,
                         float (&sums)[kKeysPerLane][kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float4 q = *reinterpret_cast<const float4*>(q_means + r * kHeadDim + step * kDimsPerStep);
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      float& sum = sums[i][r];
      sum = fmaf(q.x, keys[i].x, sum);
      sum = fmaf(q.y, keys[i].y, sum);
      sum = fmaf(q.z, keys[i].z, sum);
      sum = fmaf(q.w, keys[i].w, sum);
    }
  }
}

// logits[row * stride + j] = q_means[row] . k_means[j] for j < num_keys and row < num_rows, with
// kRows rows of mean queries (kLogitRows, kHeadDim) in shared memory. Runs in all warps of the CTA,
// which take 32 keys in turn.
template <int kHeadDim, int kRows>
__device__ void compute_logits(const float* q_means, const float* k_means, int num_keys,
                               int num_rows, int stride, float* logits) {
  constexpr int kSteps = kHeadDim / kDimsPerStep;
  static_assert(kSteps % kStepsAtOnce == 0);
  q_means += threadIdx.x % 4 * 4;
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
#pragma unroll 1
  for (int first = warp * kKeysPerWarp; first < num_keys; first += kLogitRows * kKeysPerWarp) {
    const KeyRows<kHeadDim> rows(k_means, first, num_keys);
    float sums[kKeysPerLane][kRows] = {};
#pragma unroll 1
    for (int step = 0; step < kSteps; step += kStepsAtOnce) {
      float4 keys[kStepsAtOnce][kKeysPerLane];
      rows.load(step, keys);
#pragma unroll
      for (int s = 0; s < kStepsAtOnce; ++s) {
        add_step<kHeadDim>(keys[s], q_means, step + s, sums);
      }
    }
    float totals[kRows];
    add_over_quad(sums, totals);
    const int j = first + key_of_lane();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < num_rows && j < num_keys) logits[r * stride + j] = totals[r];
    }
  }
}

}  // namespace pbs::cuda::sm80
