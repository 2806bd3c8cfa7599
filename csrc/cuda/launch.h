// The CUDA launchers: a params struct, a stream (cudaStream_t as void*), and back to the host an
// error text, or null. No torch and no CUDA headers, so that ops_cuda.cpp compiles without nvcc.
#pragma once

#include "pbs/params.h"

namespace pbs::cuda {

// bfloat16 and float16 only. workspace: score_workspace_floats of them, on the current device.
const char* launch_score_keys(const ScoreKeysParams& params, float* workspace, void* stream);
int64_t score_workspace_floats(const ScoreKeysParams& params);
const char* launch_sort_segments(const SortSegmentsParams& params, void* stream);
const char* launch_permute_kv(const PermuteKVParams& params, void* stream);
// workspace: select_workspace_floats of them.
const char* launch_select_blocks(const SelectBlocksParams& params, float* workspace, void* stream);
int64_t select_workspace_floats(const SelectBlocksParams& params);
// The same with num_samples > 0; bfloat16 and float16 only.
const char* launch_select_sampled(const SelectBlocksParams& params, float* workspace, void* stream);
int64_t sampled_workspace_floats(const SelectBlocksParams& params);
// bfloat16 and float16 only. workspace: attend_workspace_ints of them.
const char* launch_attend(const AttendParams& params, int32_t* workspace, void* stream);
int64_t attend_workspace_ints(const AttendParams& params);

// The device that is current, and its compute capability as 10 * major + minor.
const char* current_device(int* device);
const char* set_device(int device);
const char* compute_capability(int device, int* capability);

}  // namespace pbs::cuda
