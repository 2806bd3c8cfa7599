// The functions of kernels.h for single items, as compiled for one instruction set.
#pragma once

#include "kernels.h"
#include "pbs/geometry.h"

namespace pbs::cpu::PBS_CPU_ARCH {

void score_chunk(const ScoreKeysParams& params, const ScoreStates& states, int64_t item,
                 float* scratch);
void score_merge(const ScoreKeysParams& params, const ScoreStates& states, int64_t item,
                 float* scratch);
void score_average(const ScoreKeysParams& params, const ScoreStates& states, int64_t item,
                   float* scratch);
int64_t score_scratch(const ScoreKeysParams& params);

void permute_block(const PermuteKVParams& params, int64_t item, float* scratch);
int64_t permute_scratch(const PermuteKVParams& params);

void block_mass(const SelectBlocksParams& params, int64_t item, float* scratch);
int64_t select_scratch(const SelectBlocksParams& params);
// The functions that block_mass calls, by score. `mass` is (num_mass_entries).
void mean_mass(const SelectBlocksParams& params, const QueryBlock& block, const SelectItem& item,
               float* mass, float* scratch);
int64_t mean_scratch(const SelectBlocksParams& params);
void sampled_mass(const SelectBlocksParams& params, const QueryBlock& block, const SelectItem& item,
                  float* mass, float* scratch);
int64_t sampled_scratch(const SelectBlocksParams& params);

void attend_block(const AttendParams& params, int64_t item, float* scratch);
int64_t attend_scratch(const AttendParams& params);

const Kernels& table();

}  // namespace pbs::cpu::PBS_CPU_ARCH
