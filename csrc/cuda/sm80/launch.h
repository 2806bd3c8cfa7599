// The launchers of the sm80 family, as ../launch.h describes them. score_keys, attend and sampled
// scores take bfloat16 and float16, the others float32 too.
#pragma once

#include "pbs/params.h"
#include "pbs/sm80/select_tiles.h"

namespace pbs::cuda::sm80 {

int64_t score_keys_workspace(const ScoreKeysParams& params);
const char* launch_score_keys(const ScoreKeysParams& params, void* workspace, void* stream);

int64_t permute_kv_workspace(const PermuteKVParams& params);
const char* launch_permute_kv(const PermuteKVParams& params, void* workspace, void* stream);

// select_blocks: each score has a folder of its own.
int64_t select_mean_workspace(const SelectBlocksParams& params);
const char* launch_select_mean(const SelectBlocksParams& params, void* workspace, void* stream);
int64_t select_sampled_workspace(const SelectBlocksParams& params);
const char* launch_select_sampled(const SelectBlocksParams& params, void* workspace, void* stream);

int64_t attend_workspace(const AttendParams& params);
const char* launch_attend(const AttendParams& params, void* workspace, void* stream);

}  // namespace pbs::cuda::sm80
