// The rows of the launch table, in the order of kGpuFamilies.
#include "launch.h"

#include <iterator>

#include "common/launch.h"
#include "pbs/arch.h"
#include "sm80/launch.h"
#include "sm90/launch.h"

namespace pbs::cuda {
namespace {

constexpr Launchers kTable[] = {
    {
        {sm90::score_keys_workspace, sm90::launch_score_keys},
        {sort_segments_workspace, launch_sort_segments},
        {sm90::permute_kv_workspace, sm90::launch_permute_kv},
        {copy_pages_workspace, launch_copy_pages},
        {sm90::select_blocks_workspace, sm90::launch_select_blocks},
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
        {sm80::select_blocks_workspace, sm80::launch_select_blocks},
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
