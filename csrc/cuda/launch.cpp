// The rows of the launch table, in the order of kGpuFamilies.
#include "launch.h"

#include <iterator>

#include "common/launch.h"
#include "pbs/arch.h"
#include "pbs/fail.h"
#include "sm80/launch.h"
#include "sm90/launch.h"

namespace pbs::cuda {
namespace {

// select_blocks of a family. Each score has a kernel.
template <auto kMean, auto kSampled>
int64_t workspace_by_score(const SelectBlocksParams& params) {
  switch (params.rule.score) {
    case Score::kMean:
      return kMean(params);
    case Score::kSampled:
      return kSampled(params);
  }
  fail("score must be one with a CUDA kernel");
}

template <auto kMean, auto kSampled>
const char* launch_by_score(const SelectBlocksParams& params, void* workspace, void* stream) {
  switch (params.rule.score) {
    case Score::kMean:
      return kMean(params, workspace, stream);
    case Score::kSampled:
      return kSampled(params, workspace, stream);
  }
  fail("score must be one with a CUDA kernel");
}

constexpr Launchers kTable[] = {
    {
        {sm90::score_keys_workspace, sm90::launch_score_keys},
        {sort_segments_workspace, launch_sort_segments},
        {sm90::permute_kv_workspace, sm90::launch_permute_kv},
        {copy_pages_workspace, launch_copy_pages},
        {workspace_by_score<sm90::select_mean_workspace, sm90::select_sampled_workspace>,
         launch_by_score<sm90::launch_select_mean, sm90::launch_select_sampled>},
        {sm90::attend_workspace, sm90::launch_attend},
        kMaxSegmentSize,
        kStackRows,
        sm90::max_key_blocks,
    },
    {
        {sm80::score_keys_workspace, sm80::launch_score_keys},
        {sort_segments_workspace, launch_sort_segments},
        {sm80::permute_kv_workspace, sm80::launch_permute_kv},
        {copy_pages_workspace, launch_copy_pages},
        {workspace_by_score<sm80::select_mean_workspace, sm80::select_sampled_workspace>,
         launch_by_score<sm80::launch_select_mean, sm80::launch_select_sampled>},
        {sm80::attend_workspace, sm80::launch_attend},
        kMaxSegmentSize,
        kStackRows,
        sm80::max_key_blocks,
    },
};
static_assert(std::size(kTable) == std::size(kGpuFamilies));

}  // namespace

const Launchers& launchers(int family) { return kTable[family]; }

}  // namespace pbs::cuda
