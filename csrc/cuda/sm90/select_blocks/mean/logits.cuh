// Logits of a few query blocks against all key blocks, on tensor cores in float32.
//
// The rows of a product are key blocks, from registers. Its columns are query blocks, from shared
// memory. Its dimensions may have any order that both sides share: a thread loads four adjacent
// dimensions of two keys, which are the operands of two products.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "pbs/sm90/select_tiles.h"
#include "sm90/warpgroup.cuh"

namespace pbs::cuda::sm90 {

constexpr int kRowWarpgroups = kRowWarps / 4;
constexpr int kKeysPerProduct = 64;
constexpr int kDimsPerProduct = 8;
constexpr int kDimsPerPart = 16;  // loaded together

// A float32 as the sum of two TF32 numbers. The tensor core ignores their last 13 bits, and the
// error is 2^-21. A NaN becomes a NaN in `low`.
struct Halves {
  uint32_t high;
  uint32_t low;
};

__device__ inline Halves split(float x) {
  const uint32_t high = (__float_as_uint(x) + 0x1000) & 0xffffe000;
  return Halves{high, __float_as_uint(x - __uint_as_float(high))};
}

using LogitMma = cute::SM90::GMMA::MMA_64x16x8_F32TF32TF32_RS_TN<>;
constexpr int kLogits = 8;  // per thread and product

// One product's part of the mean queries: (query, dimension) in units of 8 x 4, without a swizzle.
using QueryLayout = cute::Layout<
    cute::Shape<cute::Shape<cute::_8, cute::Int<kLogitRows / 8>>, cute::Shape<cute::_4, cute::_2>>,
    cute::Stride<cute::Stride<cute::_4, cute::_32>,
                 cute::Stride<cute::_1, cute::Int<4 * kLogitRows>>>>;

// Mean queries as two halves, so that each query is split once. The sum of the halves is the
// float32.
struct SplitQueries {
  uint32_t* high;  // (head_dim / 4, kLogitRows, 4)
  uint32_t* low;

  __device__ void write(int row, int d, float x) const {
    const Halves halves = split(x);
    high[place(row, d)] = halves.high;
    low[place(row, d)] = halves.low;
  }
  __device__ float read(int row, int d) const {
    return __uint_as_float(high[place(row, d)]) + __uint_as_float(low[place(row, d)]);
  }

 private:
  __device__ static int place(int row, int d) {
    return (d / 16 * 4 + d % 4) * 4 * kLogitRows + row * 4 + d % 16 / 4;
  }
};

__device__ inline OperandDescriptor describe_queries(const uint32_t* queries) {
  const auto* tf32 = reinterpret_cast<const cutlass::tfloat32_t*>(queries);
  return OperandDescriptor(cute::SM90::GMMA::make_gmma_desc<cute::SM90::GMMA::Major::K>(
      cute::make_tensor(cute::make_smem_ptr(tf32), QueryLayout{})));
}

// Four dimensions of a thread's two keys.
struct KeyPart {
  float4 first;
  float4 second;
};

// Where the keys of a thread are. Keys past the end repeat the last one.
template <int kHeadDim>
struct KeyRows {
  const float* first;
  const float* second;

  __device__ KeyRows(const float* k_means, int key, int num_keys)
      : first(k_means + min(key, num_keys - 1) * kHeadDim),
        second(k_means + min(key + 8, num_keys - 1) * kHeadDim) {}

  __device__ KeyPart load(int nth) const {
    const auto four = [](const float* x) { return __ldg(reinterpret_cast<const float4*>(x)); };
    return KeyPart{four(first + nth * kDimsPerPart), four(second + nth * kDimsPerPart)};
  }
};

// Operands of one product.
struct KeyOperands {
  uint32_t high[4];
  uint32_t low[4];

  __device__ KeyOperands(float first_x, float second_x, float first_y, float second_y) {
    const float x[] = {first_x, second_x, first_y, second_y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Halves halves = split(x[i]);
      high[i] = halves.high;
      low[i] = halves.low;
    }
    fence_operands(high);
    fence_operands(low);
  }
};

__device__ inline void add_product(const uint32_t (&a)[4], uint64_t b, float (&sums)[kLogits]) {
  LogitMma::fma(a[0], a[1], a[2], a[3], b, sums[0], sums[1], sums[2], sums[3], sums[4], sums[5],
                sums[6], sums[7]);
}

// Mean queries in the layout of the products' operands.
struct QueryOperands {
  OperandDescriptor high;
  OperandDescriptor low;
};

// Adds the products of the dimensions of a part.
__device__ inline void add_part(const KeyPart& part, int nth, const QueryOperands& queries,
                                float (&sums)[kLogits]) {
  constexpr int kProducts = kDimsPerPart / kDimsPerProduct;
  constexpr int kQueryBytes = kDimsPerProduct * kLogitRows * sizeof(uint32_t);  // bytes per product
  const float4& x = part.first;
  const float4& y = part.second;
  const KeyOperands operands[kProducts] = {{x.x, y.x, x.y, y.y}, {x.z, y.z, x.w, y.w}};
  fence_operands(sums);
  cute::warpgroup_arrive();
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    const uint64_t high = queries.high.at((nth * kProducts + i) * kQueryBytes);
    add_product(operands[i].low, high, sums);
    add_product(operands[i].high, queries.low.at((nth * kProducts + i) * kQueryBytes), sums);
    add_product(operands[i].high, high, sums);
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_wait<0>();
  fence_operands(sums);
}

// logits[row * stride + j] = q_means[row] . k_means[j] for j < num_keys, for kLogitRows rows, of
// which the first num_rows are written. Runs in the row warps, whose warpgroups take 64 keys in
// turn. Calls wait() for the mean queries when the first keys are being loaded.
template <int kHeadDim, class Wait>
__device__ void compute_logits(const SplitQueries& q_means, const float* k_means, int num_keys,
                               int num_rows, int stride, float* logits, Wait wait) {
  constexpr int kKeysAtOnce = kRowWarpgroups * kKeysPerProduct;
  constexpr int kParts = kHeadDim / kDimsPerPart;
  constexpr int kPartsAhead = kParts % 4 == 0 ? 4 : 3;
  static_assert(kParts % kPartsAhead == 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int own_key = row_of_thread(static_cast<int>(threadIdx.x) % 128);
  const QueryOperands queries{describe_queries(q_means.high), describe_queries(q_means.low)};
  int first = uniform(static_cast<int>(threadIdx.x) / 128) * kKeysPerProduct;
  if (first >= num_keys) return wait();
  k_means += lane % 4 * 4;
  KeyRows<kHeadDim> keys(k_means, first + own_key, num_keys);
  KeyPart parts[kPartsAhead];
#pragma unroll
  for (int i = 0; i < kPartsAhead; ++i) parts[i] = keys.load(i);
  wait();
#pragma unroll 1
  for (; first < num_keys; first += kKeysAtOnce) {
    const KeyRows<kHeadDim> next_keys(k_means, first + kKeysAtOnce + own_key, num_keys);
    float sums[kLogits] = {};
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      KeyPart& part = parts[i % kPartsAhead];
      add_part(part, i, queries, sums);
      const int next = i + kPartsAhead;
      if (next < kParts) {
        part = keys.load(next);
      } else if (first + kKeysAtOnce < num_keys) {
        part = next_keys.load(next - kParts);
      }
    }
    keys = next_keys;
#pragma unroll
    for (int e = 0; e < kLogits; ++e) {
      const int row = column_of(e, lane);
      const int j = first + own_key + 8 * row_of(e);
      if (row < num_rows && j < num_keys) logits[row * stride + j] = sums[e];
    }
  }
}

}  // namespace pbs::cuda::sm90
