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

  // item: (b, q head, query block) -> the softmax over [candidates, own blocks] in scratch[0..n).
  void (*block_mass)(const SelectBlocksParams&, int64_t item, float* scratch);
  int64_t (*select_scratch)(const SelectBlocksParams&);

  // item: (b, q head, query block).
  void (*attend_block)(const AttendParams&, int64_t item, float* scratch);
  int64_t (*attend_scratch)(const AttendParams&);
};

// The kernels for the widest instruction set this CPU has.
const Kernels& kernels();

void sort_segment(const SortSegmentsParams& params, int64_t item);

// Sets the row of block_mask and the count of one (b, q head, query block) from its block masses.
void select_top_mass(const SelectBlocksParams& params, int64_t item, const float* mass);

}  // namespace pbs::cpu
