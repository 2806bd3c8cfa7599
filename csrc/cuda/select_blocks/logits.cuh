// Logits of a few query blocks against all key blocks, on tensor cores in float32.
#pragma once

#include <cute/arch/mma_sm80.hpp>

namespace pbs::cuda {

constexpr int kLogitRows = 16;  // of one product
constexpr int kKeysPerTile = 8;
constexpr int kTilesPerWarp = 4;

// Floats from one mean query to the next in shared memory: two rows fill all banks.
__host__ __device__ constexpr int query_stride(int head_dim) { return head_dim + 16; }

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

using LogitMma = cute::SM80_16x8x8_F32TF32TF32F32_TN;

__device__ inline void add_product(float (&sums)[4], const uint32_t (&a)[4],
                                   const uint32_t (&b)[2]) {
  LogitMma::fma(sums[0], sums[1], sums[2], sums[3], a[0], a[1], a[2], a[3], b[0], b[1], sums[0],
                sums[1], sums[2], sums[3]);
}

// logits[row * stride + j] = q_means[row] . k_means[j] for j < num_keys, of kLogitRows rows of
// which the first num_rows are written. By the first num_warps warps of the CTA, 32 keys at a time
// each. In a product, dimensions may stand in any order that both sides share: a lane takes four
// that follow each other, of one key and two queries, and these feed two products.
__device__ inline void compute_logits(const float* q_means, const float* k_means, int head_dim,
                                      int num_keys, int num_rows, int stride, int num_warps,
                                      float* logits) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kKeys = kKeysPerTile * kTilesPerWarp;
  const float* queries = q_means + lane / 4 * query_stride(head_dim) + lane % 4 * 4;
  for (int first = static_cast<int>(threadIdx.x) / 32 * kKeys; first < num_keys;
       first += num_warps * kKeys) {
    const float* keys[kTilesPerWarp];
#pragma unroll
    for (int t = 0; t < kTilesPerWarp; ++t) {
      // Those past the end repeat the last one.
      const int key = min(first + t * kKeysPerTile + lane / 4, num_keys - 1);
      keys[t] = k_means + static_cast<int64_t>(key) * head_dim + lane % 4 * 4;
    }
    float sums[kTilesPerWarp][4] = {};
#pragma unroll 2
    for (int d = 0; d < head_dim; d += 16) {
      float4 key[kTilesPerWarp];
#pragma unroll
      for (int t = 0; t < kTilesPerWarp; ++t) {
        key[t] = __ldg(reinterpret_cast<const float4*>(keys[t] + d));
      }
      const float4 upper = *reinterpret_cast<const float4*>(queries + d);
      const float4 lower =
          *reinterpret_cast<const float4*>(queries + 8 * query_stride(head_dim) + d);
      const auto multiply = [&](float upper0, float lower0, float upper1, float lower1,
                                auto pair_of) {
        const Halves a[] = {split(upper0), split(lower0), split(upper1), split(lower1)};
        const uint32_t a_high[] = {a[0].high, a[1].high, a[2].high, a[3].high};
        const uint32_t a_low[] = {a[0].low, a[1].low, a[2].low, a[3].low};
#pragma unroll
        for (int t = 0; t < kTilesPerWarp; ++t) {
          const float2 pair = pair_of(key[t]);
          const Halves b[] = {split(pair.x), split(pair.y)};
          const uint32_t b_high[] = {b[0].high, b[1].high};
          const uint32_t b_low[] = {b[0].low, b[1].low};
          add_product(sums[t], a_low, b_high);
          add_product(sums[t], a_high, b_low);
          add_product(sums[t], a_high, b_high);
        }
      };
      multiply(upper.x, lower.x, upper.y, lower.y, [](float4 x) { return float2{x.x, x.y}; });
      multiply(upper.z, lower.z, upper.w, lower.w, [](float4 x) { return float2{x.z, x.w}; });
    }
#pragma unroll
    for (int t = 0; t < kTilesPerWarp; ++t) {
      const int key = first + t * kKeysPerTile + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        if (row >= num_rows) continue;
        if (key < num_keys) logits[row * stride + key] = sums[t][2 * half];
        if (key + 1 < num_keys) logits[row * stride + key + 1] = sums[t][2 * half + 1];
      }
    }
  }
}

}  // namespace pbs::cuda
