// The per-item functions of kernels.h as compiled for one instruction set.
#pragma once

#include "kernels.h"

namespace pbs::cpu::PBS_CPU_ARCH {

void score_chunk(const ScoreKeysParams& params, int64_t item, float* scratch);
void score_merge(const ScoreKeysParams& params, int64_t item, float* scratch);
void score_average(const ScoreKeysParams& params, int64_t item, float* scratch);
int64_t score_scratch(const ScoreKeysParams& params);

void permute_block(const PermuteKVParams& params, int64_t item, float* scratch);
int64_t permute_scratch(const PermuteKVParams& params);

void block_mass(const SelectBlocksParams& params, int64_t item, float* scratch);
int64_t select_scratch(const SelectBlocksParams& params);

void attend_block(const AttendParams& params, int64_t item, float* scratch);
int64_t attend_scratch(const AttendParams& params);

const Kernels& table();

}  // namespace pbs::cpu::PBS_CPU_ARCH
