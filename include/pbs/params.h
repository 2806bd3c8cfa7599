// Parameters of the five stages: plain structs, a shape beside every pointer, no torch.
//
// B batch, Hq query heads, Hkv key/value heads, Hp heads that own a permutation (Hkv or Hq),
// Nq query rows, Nkv key rows, D head dim. Strides count elements; the last dim is contiguous.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"

namespace pbs {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A (B, H, N, D) tensor with any strides but the last.
struct ConstRows {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct MutableRows {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct Problem {
  int64_t batch;
  int64_t num_q_heads;
  int64_t num_kv_heads;
  int64_t num_perm_heads;
  int64_t num_q;
  int64_t num_kv;
  int64_t head_dim;
  DType dtype;
};

struct Blocking {
  int64_t block_size;     // rows of a query block
  int64_t kv_block_size;  // rows of a key block
  int64_t segment_size;   // rows of a segment, a multiple of both
};

// The last query rows, whose attention says how important a key is.
constexpr int64_t num_score_rows(const Problem& problem, const Blocking& blocking) {
  return problem.num_q < blocking.block_size ? problem.num_q : blocking.block_size;
}

struct ScoreKeysParams {
  Problem problem;
  Blocking blocking;
  float scale;
  ConstRows q;        // (B, Hq, Nq, D)
  ConstRows k;        // (B, Hkv, Nkv, D)
  float* row_max;     // (B, Hq, num_chunks, num_score_rows), of scale * log2(e) * q.k
  float* row_sum;     // (B, Hq, num_chunks, num_score_rows), of exp2(score - row_max)
  float* importance;  // (B, Hp, Nkv)
};

struct SortSegmentsParams {
  int64_t num_heads;  // B * Hp
  int64_t num_kv;     // Nkv
  int64_t segment_size;
  int64_t num_heavy;        // negative: full sort
  const float* importance;  // (B * Hp, Nkv)
  int32_t* perm;            // (B * Hp, Nkv)
};

struct PermuteKVParams {
  Problem problem;
  int64_t kv_block_size;
  int64_t num_copied;   // rows of k_perm and v_perm to write, from the first on
  ConstRows k;          // (B, Hkv, Nkv, D)
  ConstRows v;          // (B, Hkv, Nkv, D)
  const int32_t* perm;  // (B, Hp, Nkv)
  void* k_perm;         // (B, Hp, Nkv, D), contiguous
  void* v_perm;         // (B, Hp, Nkv, D), contiguous
  float* k_mean;        // (B, Hp, num_kv_blocks, D)
};

// Key blocks of a head whose rows and means are written.
constexpr int64_t num_copied_blocks(const PermuteKVParams& params) {
  return ceil_div(params.num_copied, params.kv_block_size);
}

struct SelectBlocksParams {
  Problem problem;
  Blocking blocking;
  float scale;
  double threshold;
  bool is_causal;
  bool is_mass_causal;   // the own segment's mass counts towards the threshold
  bool is_by_block;      // each block has to reach the threshold by itself
  int32_t num_samples;   // queries of a block that score key by key; 0: its mean scores mean keys
  ConstRows q;           // (B, Hq, Nq, D)
  ConstRows k;           // (B, Hkv, Nkv, D)
  ConstRows k_perm;      // (B, Hp, Nkv, D), read where num_samples is positive
  const float* k_mean;   // (B, Hp, num_kv_blocks, D)
  const int32_t* perm;   // (B, Hp, Nkv) or null for the identity
  uint32_t* block_mask;  // (B, Hq, num_q_blocks, num_words)
  int32_t* counts;       // (B, Hq, num_q_blocks)
};

// Key blocks of an own segment, in their own order.
constexpr int64_t num_own_entries(const Blocking& blocking) {
  return ceil_div(blocking.segment_size + blocking.block_size, blocking.kv_block_size);
}

// Shares of one query block: of every key block, and of its own segment's.
constexpr int64_t num_mass_entries(const SelectBlocksParams& params) {
  return ceil_div(params.problem.num_kv, params.blocking.kv_block_size) +
         num_own_entries(params.blocking);
}

struct AttendParams {
  Problem problem;
  Blocking blocking;
  float scale;
  bool is_causal;
  ConstRows q;                 // (B, Hq, Nq, D)
  ConstRows k;                 // (B, Hkv, Nkv, D)
  ConstRows v;                 // (B, Hkv, Nkv, D)
  ConstRows k_perm;            // (B, Hp, Nkv, D)
  ConstRows v_perm;            // (B, Hp, Nkv, D)
  const uint32_t* block_mask;  // (B, Hq, num_q_blocks, num_words)
  MutableRows out;             // (B, Hq, Nq, D)
  float* lse;                  // (B, Hq, Nq)
};

}  // namespace pbs
