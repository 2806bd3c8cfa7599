// The CPU work of each stage, cut into independent items. ops_cpu.cpp distributes them over
// threads.
//
// Each item writes its own part of the outputs only and has a scratch buffer of its own, so the
// result does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "pbs/params.h"

namespace pbs::cpu {

constexpr int64_t kScoreChunk = 512;  // keys per item of score_keys

// Intermediate results of score_keys between its passes.
struct ScoreStates {
  float* row_max;  // (B, Hq, num_chunks, num_score_rows), maximum of scale * log2(e) * q.k
  float* row_sum;  // (B, Hq, num_chunks, num_score_rows), sum of exp2(score - row_max)
};

// One selection: a query block in heads_per_selection query heads, starting with first_head.
struct SelectItem {
  int64_t b;
  int64_t first_head;
  int64_t q_block_idx;
};

constexpr int64_t num_select_items(const SelectBlocksParams& params) {
  const Problem& problem = params.problem;
  if (problem.num_q_heads == 0) return 0;
  return problem.batch * problem.num_q_heads / heads_per_selection(problem, params.rule) *
         num_query_blocks(problem, params.blocking);
}

constexpr SelectItem select_item(const SelectBlocksParams& params, int64_t item) {
  const int64_t num_q_blocks = num_query_blocks(params.problem, params.blocking);
  const int64_t head = item / num_q_blocks * heads_per_selection(params.problem, params.rule);
  return {head / params.problem.num_q_heads, head % params.problem.num_q_heads,
          item % num_q_blocks};
}

// Whether any candidate of a query block may be left out. If not, the masses are not needed.
constexpr bool needs_mass(const SelectBlocksParams& params, const QueryBlock& block) {
  return params.rule.threshold < 1.0 && num_scored_blocks(block, params.problem, params.blocking,
                                                          params.rule, params.is_causal) > 0;
}

struct Kernels {
  const char* name;

  // item: (b, q head, chunk of keys) -> row_max and row_sum of the chunk.
  void (*score_chunk)(const ScoreKeysParams&, const ScoreStates&, int64_t item, float* scratch);
  // item: (b, q head). Merges row_max and row_sum of all chunks into those of chunk 0.
  void (*score_merge)(const ScoreKeysParams&, const ScoreStates&, int64_t item, float* scratch);
  // item: (b, perm head, chunk of keys) -> importance.
  void (*score_average)(const ScoreKeysParams&, const ScoreStates&, int64_t item, float* scratch);
  int64_t (*score_scratch)(const ScoreKeysParams&);  // number of floats

  // item: (b, perm head, key block).
  void (*permute_block)(const PermuteKVParams&, int64_t item, float* scratch);
  int64_t (*permute_scratch)(const PermuteKVParams&);

  // item: that of select_item -> the masses of [candidates, own blocks] in scratch[0..n). Own
  // blocks are left out unless the rule counts them. Writes nothing if needs_mass is false.
  void (*block_mass)(const SelectBlocksParams&, int64_t item, float* scratch);
  int64_t (*select_scratch)(const SelectBlocksParams&);

  // item: (b, q head, query block).
  void (*attend_block)(const AttendParams&, int64_t item, float* scratch);
  int64_t (*attend_scratch)(const AttendParams&);
};

// The kernels for the widest instruction set this CPU has.
const Kernels& kernels();

void sort_segment(const SortSegmentsParams& params, int64_t item);
// A row of the keys and of the values of a head.
void copy_page_row(const CopyPagesParams& params, int64_t item);

// Writes the rows of block_mask and the counts of one select_item, given its block masses.
void select_top_mass(const SelectBlocksParams& params, int64_t item, const float* mass);

}  // namespace pbs::cpu
