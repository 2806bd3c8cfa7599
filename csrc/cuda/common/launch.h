// The launchers that all GPU families share. ../launch.h describes them.
#pragma once

#include "pbs/params.h"

namespace pbs::cuda {

constexpr int64_t kMaxSegmentSize = 4096;  // keys that a CTA can sort in shared memory

int64_t sort_segments_workspace(const SortSegmentsParams& params);
const char* launch_sort_segments(const SortSegmentsParams& params, void* workspace, void* stream);

int64_t copy_pages_workspace(const CopyPagesParams& params);
const char* launch_copy_pages(const CopyPagesParams& params, void* workspace, void* stream);

}  // namespace pbs::cuda
