// Logits of a few query blocks against all key blocks, on tensor cores in float32.
#pragma once

#include <cute/arch/mma_sm80.hpp>

#include "pbs/select_tiles.h"

namespace pbs::cuda {

constexpr int kKeysPerTile = 8;
constexpr int kStepDims = 16;
constexpr int kStepsAtOnce = 8;  // of loads in flight

// A float32 as two TF32s, of which the tensor core ignores the last 13 bits: all but 2^-21 of it. A
// NaN is one in `low`.
struct Halves {
  uint32_t high;
  uint32_t low;
};

__device__ inline Halves split(float x) {
  const uint32_t high = (__float_as_uint(x) + 0x1000) & 0xffffe000;
  return Halves{high, __float_as_uint(x - __uint_as_float(high))};
}

// Mean queries as such halves, so that each is split once. Their sum is the float32 again.
struct SplitQueries {
  uint32_t* high;  // (kLogitRows, query_stride)
  uint32_t* low;   // (kLogitRows, query_stride)

  __device__ void write(int i, float x) const {
    const Halves halves = split(x);
    high[i] = halves.high;
    low[i] = halves.low;
  }
  __device__ float read(int i) const { return __uint_as_float(high[i]) + __uint_as_float(low[i]); }
};

using LogitMma = cute::SM80_16x8x8_F32TF32TF32F32_TN;

__device__ inline void add_product(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  LogitMma::fma(sums[0], sums[1], sums[2], sums[3], a[0], a[1], a[2], a[3], b0, b1, sums[0],
                sums[1], sums[2], sums[3]);
}

// A product in three parts, none of which waits for another: a tensor core takes its time.
struct LogitSums {
  float low_high[4] = {};
  float high_low[4] = {};
  float high_high[4] = {};

  __device__ float total(int i) const { return high_high[i] + (low_high[i] + high_low[i]); }
};

// Adds 16 dimensions of a product. In it, dimensions may stand in any order that both sides share:
// a lane takes four that follow each other, of one key and two queries, from `at` and `at` +
// 8 * stride on, and these feed two products.
__device__ inline void add_step(const SplitQueries& queries, int at, int stride, const float4& key,
                                LogitSums& sums) {
  const auto four = [](const uint32_t* x) { return *reinterpret_cast<const uint4*>(x); };
  const uint4 high[] = {four(queries.high + at), four(queries.high + at + 8 * stride)};
  const uint4 low[] = {four(queries.low + at), four(queries.low + at + 8 * stride)};
  const Halves b[] = {split(key.x), split(key.y), split(key.z), split(key.w)};
  const uint32_t first_high[] = {high[0].x, high[1].x, high[0].y, high[1].y};
  const uint32_t first_low[] = {low[0].x, low[1].x, low[0].y, low[1].y};
  add_product(sums.low_high, first_low, b[0].high, b[1].high);
  add_product(sums.high_low, first_high, b[0].low, b[1].low);
  add_product(sums.high_high, first_high, b[0].high, b[1].high);
  const uint32_t last_high[] = {high[0].z, high[1].z, high[0].w, high[1].w};
  const uint32_t last_low[] = {low[0].z, low[1].z, low[0].w, low[1].w};
  add_product(sums.low_high, last_low, b[2].high, b[3].high);
  add_product(sums.high_low, last_high, b[2].low, b[3].low);
  add_product(sums.high_high, last_high, b[2].high, b[3].high);
}

// logits[row * stride + j] = q_means[row] . k_means[j] for j < num_keys, of kLogitRows rows of
// which the first num_rows are written. By the first num_warps warps of the CTA, 8 keys at a time
// each, which are on their way together: few keys a warp, so that they are spread evenly.
__device__ inline void compute_logits(const SplitQueries& q_means, const float* k_means,
                                      int head_dim, int num_keys, int num_rows, int stride,
                                      int num_warps, float* logits) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first_query = lane / 4 * query_stride(head_dim) + lane % 4 * 4;
  for (int first = static_cast<int>(threadIdx.x) / 32 * kKeysPerTile; first < num_keys;
       first += num_warps * kKeysPerTile) {
    // Those past the end repeat the last one.
    const float* key = k_means +
                       static_cast<int64_t>(min(first + lane / 4, num_keys - 1)) * head_dim +
                       lane % 4 * 4;
    LogitSums sums;
#pragma unroll 1
    for (int begin = 0; begin < head_dim; begin += kStepsAtOnce * kStepDims) {
      float4 loaded[kStepsAtOnce];
#pragma unroll
      for (int step = 0; step < kStepsAtOnce; ++step) {
        const int d = begin + step * kStepDims;
        loaded[step] = d < head_dim ? __ldg(reinterpret_cast<const float4*>(key + d)) : float4{};
      }
#pragma unroll
      for (int step = 0; step < kStepsAtOnce; ++step) {
        const int d = begin + step * kStepDims;
        if (d >= head_dim) break;
        add_step(q_means, first_query + d, query_stride(head_dim), loaded[step], sums);
      }
    }
    const int column = first + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      if (row >= num_rows) continue;
      float* to = logits + row * stride + column;
      if (column < num_keys) to[0] = sums.total(2 * half);
      if (column + 1 < num_keys) to[1] = sums.total(2 * half + 1);
    }
  }
}

}  // namespace pbs::cuda
