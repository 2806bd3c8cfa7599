// The two small matrix products of attention, with queries along the vector lanes.
//
// A group of kVecs * kLanes queries is stored transposed, (head_dim, group). Keys and values are
// then read in their own layout, one broadcast scalar at a time, and every softmax reduction over
// keys is lane-wise. Only the queries are repacked.
#pragma once

#include "simd.h"

namespace pbs::cpu::PBS_CPU_ARCH {

// 32 vector registers hold a 4 x 4 tile of accumulators and its operands, 16 hold 4 x 2.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxVecs = 4;
#else
constexpr int kMaxVecs = 2;
#endif
constexpr int kTileRows = 4;

// Products are added up in runs of this many dims, and then the runs are added: rounding errors
// grow with the length of a chain of additions. A chain of 256 would lose two bits against torch's
// matrix product.
constexpr int64_t kRunDims = 32;

// scores[r][i] = sum_d queries[d][i] * keys[r][d] for kRows keys and kVecs vectors of queries.
template <int kRows, int kVecs>
inline void score_tile(const float* queries, int64_t query_stride, const float* keys,
                       int64_t key_stride, int64_t head_dim, float* scores, int64_t score_stride) {
  for (int64_t run = 0; run < head_dim; run += kRunDims) {
    Vec acc[kRows][kVecs] = {};
    for (int64_t d = run; d < run + kRunDims; ++d) {
      Vec q[kVecs];
      for (int c = 0; c < kVecs; ++c) q[c] = load(queries + d * query_stride + c * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vec key = splat(keys[r * key_stride + d]);
        for (int c = 0; c < kVecs; ++c) acc[r][c] += key * q[c];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kVecs; ++c) {
        float* score = scores + r * score_stride + c * kLanes;
        store(score, run == 0 ? acc[r][c] : load(score) + acc[r][c]);
      }
    }
  }
}

// scores (num_keys, kVecs * kLanes) = keys . queries.
template <int kVecs>
inline void score_keys_tile(const float* queries, int64_t query_stride, const float* keys,
                            int64_t key_stride, int64_t head_dim, int64_t num_keys, float* scores) {
  constexpr int64_t kScoreStride = kVecs * kLanes;
  // The number of accumulators does not depend on kVecs: with fewer, each would wait for the last.
  constexpr int kLongRows = kTileRows * kMaxVecs / kVecs;
  int64_t key = 0;
  for (; key + kLongRows <= num_keys; key += kLongRows) {
    score_tile<kLongRows, kVecs>(queries, query_stride, keys + key * key_stride, key_stride,
                                 head_dim, scores + key * kScoreStride, kScoreStride);
  }
  for (; key + kTileRows <= num_keys; key += kTileRows) {
    score_tile<kTileRows, kVecs>(queries, query_stride, keys + key * key_stride, key_stride,
                                 head_dim, scores + key * kScoreStride, kScoreStride);
  }
  for (; key < num_keys; ++key) {
    score_tile<1, kVecs>(queries, query_stride, keys + key * key_stride, key_stride, head_dim,
                         scores + key * kScoreStride, kScoreStride);
  }
}

// out[d][i] = out[d][i] * rescale[i] + sum_r weights[r][i] * values[r][d]. With kSkipsZeros, a
// value of weight 0 is left out, even if it is not finite.
template <int kVecs, bool kSkipsZeros>
inline void accumulate_values(const float* weights, const float* values, int64_t value_stride,
                              int64_t head_dim, int64_t num_keys, const Vec* rescale, float* out,
                              int64_t out_stride) {
  static_assert(kRunDims % kTileRows == 0, "every head_dim is a multiple of 32");
  constexpr int64_t kWeightStride = kVecs * kLanes;
  for (int64_t d = 0; d < head_dim; d += kTileRows) {
    Vec acc[kTileRows][kVecs] = {};
    for (int64_t key = 0; key < num_keys; ++key) {
      Vec w[kVecs];
      for (int c = 0; c < kVecs; ++c) w[c] = load(weights + key * kWeightStride + c * kLanes);
      for (int r = 0; r < kTileRows; ++r) {
        const Vec value = splat(values[key * value_stride + d + r]);
        for (int c = 0; c < kVecs; ++c) {
          if constexpr (kSkipsZeros) {
            acc[r][c] += w[c] == 0.0f ? Vec{} : value * w[c];
          } else {
            acc[r][c] += value * w[c];
          }
        }
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kVecs; ++c) {
        float* sum = out + (d + r) * out_stride + c * kLanes;
        store(sum, load(sum) * rescale[c] + acc[r][c]);
      }
    }
  }
}

// Transposes query rows into (head_dim, padded) and multiplies them by `factor`. The padding lanes
// become 0. `buffer` (num_rows, head_dim) is used for inputs that are not float32.
inline void pack_queries(const ConstRows& q, const Problem& problem, int64_t b, int64_t h,
                         int64_t first_row, int64_t num_rows, int64_t padded, float factor,
                         float* buffer, float* packed) {
  int64_t stride = 0;
  const float* rows = float_rows(q, problem, b, h, first_row, num_rows, buffer, &stride);
  for (int64_t d = 0; d < problem.head_dim; ++d) {
    float* dst = packed + d * padded;
    for (int64_t r = 0; r < num_rows; ++r) dst[r] = rows[r * stride + d] * factor;
    for (int64_t r = num_rows; r < padded; ++r) dst[r] = 0.0f;
  }
}

inline int64_t padded_rows(int64_t num_rows) { return (num_rows + kLanes - 1) / kLanes * kLanes; }

template <int kVecs>
struct Vecs {
  static constexpr int value = kVecs;
};

// Calls visit(Vecs<n>, first_lane) for groups of n vectors that together cover `padded` lanes.
template <class Visit>
inline void for_each_group(int64_t padded, Visit&& visit) {
  int64_t lane = 0;
  for (; lane + kMaxVecs * kLanes <= padded; lane += kMaxVecs * kLanes) {
    visit(Vecs<kMaxVecs>{}, lane);
  }
  for (; lane + 2 * kLanes <= padded; lane += 2 * kLanes) visit(Vecs<2>{}, lane);
  for (; lane < padded; lane += kLanes) visit(Vecs<1>{}, lane);
}

}  // namespace pbs::cpu::PBS_CPU_ARCH
