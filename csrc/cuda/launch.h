// The CUDA launchers: a params struct, a stream (cudaStream_t as void*), and back to the host an
// error text, or null. No torch and no CUDA headers, so that ops_cuda.cpp compiles without nvcc.
#pragma once

#include "pbs/params.h"

namespace pbs::cuda {

const char* launch_permute_kv(const PermuteKVParams& params, void* stream);
// bfloat16 and float16 only. workspace: attend_workspace_ints of them.
const char* launch_attend(const AttendParams& params, int32_t* workspace, void* stream);
int64_t attend_workspace_ints(const AttendParams& params);

// The device that is current, and its compute capability as 10 * major + minor.
const char* current_device(int* device);
const char* set_device(int device);
const char* compute_capability(int device, int* capability);

}  // namespace pbs::cuda
