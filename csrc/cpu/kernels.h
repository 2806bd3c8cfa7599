// The CPU work of each stage, cut into independent items; ops_cpu.cpp spreads them over threads.
//
// Each item touches only its own part of the outputs and gets a scratch buffer of its own, so the
// result does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "pbs/params.h"

namespace pbs::cpu {

constexpr int64_t kScoreChunk = 512;  // keys per item of score_keys

// What score_keys keeps between its passes.
struct ScoreStates {
  float* row_max;  // (B, Hq, num_chunks, num_score_rows), of scale * log2(e) * q.k
  float* row_sum;  // (B, Hq, num_chunks, num_score_rows), of exp2(score - row_max)
};

// Whose selection it is: of a query block in heads_per_selection query heads from first_head on.
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

// Whether any candidate of a query block may be left out. Else nobody asks for the masses.
constexpr bool needs_mass(const SelectBlocksParams& params, const QueryBlock& block) {
  return params.rule.threshold < 1.0 && num_scored_blocks(block, params.problem, params.blocking,
                                                          params.rule, params.is_causal) > 0;
}

struct Kernels {
  const char* name;

  // item: (b, q head, chunk of keys) -> row_max, row_sum of the chunk.
  void (*score_chunk)(const ScoreKeysParams&, const ScoreStates&, int64_t item, float* scratch);
  // item: (b, q head); folds all chunks' row_max and row_sum into those of chunk 0.
  void (*score_merge)(const ScoreKeysParams&, const ScoreStates&, int64_t item, float* scratch);
  // item: (b, perm head, chunk of keys) -> importance.
  void (*score_average)(const ScoreKeysParams&, const ScoreStates&, int64_t item, float* scratch);
  int64_t (*score_scratch)(const ScoreKeysParams&);  // floats

  // item: (b, perm head, key block).
  void (*permute_block)(const PermuteKVParams&, int64_t item, float* scratch);
  int64_t (*permute_scratch)(const PermuteKVParams&);

  // item: that of select_item -> the masses of [candidates, own blocks] in scratch[0..n), of own
  // blocks where they count towards a sum. Writes nothing where needs_mass says no.
  void (*block_mass)(const SelectBlocksParams&, int64_t item, float* scratch);
  int64_t (*select_scratch)(const SelectBlocksParams&);

  // item: (b, q head, query block).
  void (*attend_block)(const AttendParams&, int64_t item, float* scratch);
  int64_t (*attend_scratch)(const AttendParams&);
};

// The kernels for the widest instruction set this CPU has.
const Kernels& kernels();

void sort_segment(const SortSegmentsParams& params, int64_t item);
// A row of a head's keys and of its values.
void copy_page_row(const CopyPagesParams& params, int64_t item);

// Sets the rows of block_mask and the counts of one select_item from its block masses.
void select_top_mass(const SelectBlocksParams& params, int64_t item, const float* mass);

}  // namespace pbs::cpu
