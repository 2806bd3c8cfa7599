// Parameters of the five stages: plain structs, a shape beside every pointer, no torch.
//
// B batch, Hq query heads, Hkv key/value heads, Hp heads that own a permutation (Hkv or Hq),
// Nq query rows, Nkv key rows, D head dim. Strides count elements; the last dim is contiguous.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"

namespace pbs {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// How select_blocks weighs a key block: by mean query . mean key, or by the largest share of
// attention that a sampled query of the block gives it.
enum class Score : int32_t { kMean, kSampled };

// Whether a score reads the means of keys (k_mean) instead of the permuted keys.
PBS_HOST_DEVICE constexpr bool reads_means(Score score) {
  switch (score) {
    case Score::kMean:
      return true;
    case Score::kSampled:
      return false;
  }
  return true;
}

// The mass that `threshold` is compared with: the mass of earlier segments, the causal mass, or the
// share of a single block in the causal mass.
enum class MassRule : int32_t { kEarlier, kCausal, kBlock };

// Weights are powers of two: exp(x) = exp2(kLog2e * x).
constexpr float kLog2e = 1.4426950408889634f;

constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A (B, H, N, D) tensor. All strides but the last are free.
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

constexpr ConstRows const_rows(const MutableRows& rows) {
  return ConstRows{rows.data, rows.batch_stride, rows.head_stride, rows.row_stride};
}
// Rows that the operator may write, according to its schema.
constexpr MutableRows writable(const ConstRows& rows) {
  return MutableRows{const_cast<void*>(rows.data), rows.batch_stride, rows.head_stride,
                     rows.row_stride};
}

// Where the rows of one sequence are in pages. The pages are (num_pages, H, page_size, D), with the
// page index as batch index: row r is row r % page_size of page table[r / page_size]. Without a
// table, the rows of each batch are contiguous.
struct Pages {
  const int32_t* table;  // (num_entries), or null
  int64_t num_entries;   // ceil(Nkv / page_size)
  int64_t page_size;
  int64_t num_pages;
};

// The position of row `row` of batch `b`, as a batch and a row of the tensor.
struct RowPlace {
  int64_t b;
  int64_t row;
};
PBS_HOST_DEVICE constexpr RowPlace place_of(const Pages& pages, int64_t b, int64_t row) {
  if (pages.table == nullptr) return RowPlace{b, row};
  return RowPlace{pages.table[row / pages.page_size], row % pages.page_size};
}

// The start of a row of a head, in elements. It is static because files of several instruction sets
// include it, and none may run the code of another.
template <class Rows>
PBS_HOST_DEVICE static constexpr int64_t row_start(const Rows& rows, const RowPlace& place,
                                                   int64_t head) {
  return place.b * rows.batch_stride + head * rows.head_stride + place.row * rows.row_stride;
}

// Sizes of (B, Hq, Nq, D), (B, Hkv, Nkv, D) and similar tensors.
struct Operands {
  ConstRows q;
  ConstRows k;
  ConstRows v;
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

// Query heads that share a key head, and query heads that share a permutation.
PBS_HOST_DEVICE constexpr int64_t heads_per_kv(const Problem& problem) {
  return problem.num_q_heads / problem.num_kv_heads;
}
PBS_HOST_DEVICE constexpr int64_t heads_per_perm(const Problem& problem) {
  return problem.num_q_heads / problem.num_perm_heads;
}

PBS_HOST_DEVICE constexpr int64_t num_query_blocks(const Problem& problem,
                                                   const Blocking& blocking) {
  return ceil_div(problem.num_q, blocking.block_size);
}
PBS_HOST_DEVICE constexpr int64_t num_key_blocks(const Problem& problem, const Blocking& blocking) {
  return ceil_div(problem.num_kv, blocking.kv_block_size);
}

PBS_HOST_DEVICE constexpr QueryBlock query_block(int64_t q_block_idx, const Problem& problem,
                                                 const Blocking& blocking, bool is_causal) {
  return query_block(q_block_idx, problem.num_q, problem.num_kv, blocking.block_size,
                     blocking.kv_block_size, blocking.segment_size, is_causal);
}

// Permuted keys that at least one query block may select: the candidates of the last one.
constexpr int64_t num_candidate_rows(const Problem& problem, const Blocking& blocking,
                                     bool is_causal) {
  const int64_t num_blocks = num_query_blocks(problem, blocking);
  if (num_blocks == 0) return 0;
  return query_block(num_blocks - 1, problem, blocking, is_causal).num_candidates *
         blocking.kv_block_size;
}

// The last query rows, which determine the importance of keys.
constexpr int64_t num_score_rows(const Problem& problem, const Blocking& blocking) {
  return problem.num_q < blocking.block_size ? problem.num_q : blocking.block_size;
}

struct ScoreKeysParams {
  Problem problem;
  Blocking blocking;
  float scale;
  ConstRows q;        // (B, Hq, Nq, D)
  ConstRows k;        // (B, Hkv, Nkv, D)
  float* importance;  // (B, Hp, Nkv)
};

// Only keys of complete segments have scores.
constexpr int64_t num_scored_keys(const ScoreKeysParams& params) {
  return round_down(params.problem.num_kv, params.blocking.segment_size);
}

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
  int64_t num_copied;      // rows of k_perm and v_perm to write, starting with the first
  int64_t first_page_row;  // row of the sequence in pages to which the first row goes
  Pages pages;             // of k_perm and v_perm
  ConstRows k;             // (B, Hkv, Nkv, D)
  ConstRows v;             // (B, Hkv, Nkv, D)
  const int32_t* perm;     // (B, Hp, Nkv)
  MutableRows k_perm;      // (B, Hp, Nkv, D), or pages
  MutableRows v_perm;      // (B, Hp, Nkv, D), or pages
  float* k_mean;           // (B, Hp, num_kv_blocks, D), or null if it is not needed
};

// The key blocks of a head whose rows and means are written.
constexpr int64_t num_copied_blocks(const PermuteKVParams& params) {
  return ceil_div(params.num_copied, params.kv_block_size);
}

struct SelectRule {
  Score score;
  MassRule mass;        // kBlock if and only if the score is kSampled
  double threshold;     // 1 selects everything
  int32_t num_samples;  // queries of a block that kSampled uses
  bool shares_heads;    // whether the query heads of a permutation share a selection; kSampled only
  int64_t window;       // keys before a query block that it always visits, if causal
  int64_t dense_tail;   // last queries whose blocks visit every key, if causal
};

// Query heads that share a selection.
PBS_HOST_DEVICE constexpr int64_t heads_per_selection(const Problem& problem,
                                                      const SelectRule& rule) {
  return rule.shares_heads ? larger(1, heads_per_perm(problem)) : 1;
}

// Whether a query block contains one of the last queries, which visit every key.
PBS_HOST_DEVICE constexpr bool is_in_dense_tail(const QueryBlock& block, const Problem& problem,
                                                const SelectRule& rule, bool is_causal) {
  return is_causal && block.first_row + block.num_rows > problem.num_q - rule.dense_tail;
}

// Candidates of a query block before this one are selected by score. The others are always visited.
PBS_HOST_DEVICE constexpr int64_t num_scored_blocks(const QueryBlock& block, const Problem& problem,
                                                    const Blocking& blocking,
                                                    const SelectRule& rule, bool is_causal) {
  if (!is_causal) return block.num_candidates;
  if (is_in_dense_tail(block, problem, rule, is_causal)) return 0;
  const int64_t window_begin = larger(0, block.first_position - rule.window);
  return smaller(block.num_candidates,
                 round_down(window_begin, blocking.segment_size) / blocking.kv_block_size);
}

// Whether the own segment's mass counts towards the threshold.
PBS_HOST_DEVICE constexpr bool counts_own_mass(const SelectRule& rule) {
  switch (rule.mass) {
    case MassRule::kEarlier:
      return false;
    case MassRule::kCausal:
    case MassRule::kBlock:
      return true;
  }
  return true;
}

struct SelectBlocksParams {
  Problem problem;
  Blocking blocking;
  float scale;
  bool is_causal;
  SelectRule rule;
  int64_t first_k_row;   // first key row in `k`, which has the own segments only if this is not 0
  Pages pages;           // pages of k_perm
  ConstRows q;           // (B, Hq, Nq, D)
  ConstRows k;           // (B, Hkv, Nkv - first_k_row, D)
  ConstRows k_perm;      // (B, Hp, Nkv, D), or pages; for sampled scores
  const float* k_mean;   // (B, Hp, num_kv_blocks, D), for mean scores
  const int32_t* perm;   // (B, Hp, Nkv), or null for the identity
  uint32_t* block_mask;  // (B, Hq, num_q_blocks, num_words)
  int32_t* counts;       // (B, Hq, num_q_blocks)
};

// Key blocks of an own segment, in original order.
constexpr int64_t num_own_entries(const Blocking& blocking) {
  return ceil_div(blocking.segment_size + blocking.block_size, blocking.kv_block_size);
}

// The masses of one query block: one for each key block, and those of its own segment.
constexpr int64_t num_mass_entries(const SelectBlocksParams& params) {
  return num_key_blocks(params.problem, params.blocking) + num_own_entries(params.blocking);
}

// Copies rows [first_row, first_row + num_rows) of one sequence out of its pages.
struct CopyPagesParams {
  DType dtype;
  int64_t head_dim;
  int64_t num_heads;  // Hkv
  int64_t first_row;
  int64_t num_rows;
  Pages pages;
  ConstRows k_pages;  // (num_pages, Hkv, page_size, D)
  ConstRows v_pages;  // (num_pages, Hkv, page_size, D)
  MutableRows k;      // (1, Hkv, num_rows, D)
  MutableRows v;      // (1, Hkv, num_rows, D)
};

struct AttendParams {
  Problem problem;
  Blocking blocking;
  float scale;
  bool is_causal;
  int64_t first_k_row;         // first key row in `k` and `v`
  Pages pages;                 // pages of k_perm and v_perm
  ConstRows q;                 // (B, Hq, Nq, D)
  ConstRows k;                 // (B, Hkv, Nkv - first_k_row, D)
  ConstRows v;                 // (B, Hkv, Nkv - first_k_row, D)
  ConstRows k_perm;            // (B, Hp, Nkv, D), or pages
  ConstRows v_perm;            // (B, Hp, Nkv, D), or pages
  const uint32_t* block_mask;  // (B, Hq, num_q_blocks, num_words)
  MutableRows out;             // (B, Hq, Nq, D)
  float* lse;                  // (B, Hq, Nq)
};

}  // namespace pbs
