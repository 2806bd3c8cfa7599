// The launch table: for each GPU family and stage, the size of the workspace, the function that
// launches the kernels, and their limits. It needs no torch and no CUDA headers, so ops_cuda.cpp
// compiles without nvcc.
#pragma once

#include "pbs/params.h"

namespace pbs::cuda {

// `launch` takes workspace_bytes of device memory and a stream (a cudaStream_t). Both functions use
// the current device. They return an error as text, and null if there is none.
template <class Params>
struct StageLaunch {
  int64_t (*workspace_bytes)(const Params& params);
  const char* (*launch)(const Params& params, void* workspace, void* stream);
};

struct Launchers {
  StageLaunch<ScoreKeysParams> score_keys;
  StageLaunch<SortSegmentsParams> sort_segments;
  StageLaunch<PermuteKVParams> permute_kv;
  StageLaunch<CopyPagesParams> copy_pages;
  StageLaunch<SelectBlocksParams> select_blocks;
  StageLaunch<AttendParams> attend;

  int64_t max_segment_size;
  int64_t max_samples;
  // A row of mean scores must fit in shared memory.
  int64_t (*max_key_blocks)(const Problem& problem, const Blocking& blocking);
};

// The launchers of kGpuFamilies[family] (include/pbs/arch.h).
const Launchers& launchers(int family);

}  // namespace pbs::cuda
