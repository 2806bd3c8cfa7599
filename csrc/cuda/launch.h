// What a GPU family runs, in one table: for each stage the memory it needs and the function that
// launches it, and what its kernels take. No torch and no CUDA headers, so that ops_cuda.cpp
// compiles without nvcc.
#pragma once

#include "pbs/params.h"

namespace pbs::cuda {

// `launch` takes workspace_bytes of device memory and a stream (a cudaStream_t). Both work on the
// current device; an error comes back as a text, no error as null.
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
  // With mean scores: one row of them has to fit in shared memory.
  int64_t (*max_key_blocks)(const Problem& problem, const Blocking& blocking);
};

// Those of kGpuFamilies[family] (include/pbs/arch.h).
const Launchers& launchers(int family);

}  // namespace pbs::cuda
