// select_blocks of the sm80 family: one kernel for each score.
#include "pbs/fail.h"
#include "sm80/launch.h"

namespace pbs::cuda::sm80 {

int64_t select_blocks_workspace(const SelectBlocksParams& params) {
  switch (params.rule.score) {
    case Score::kMean:
      return select_mean_workspace(params);
    case Score::kSampled:
      return select_sampled_workspace(params);
  }
  fail("score must be one with a CUDA kernel");
}

const char* launch_select_blocks(const SelectBlocksParams& params, void* workspace, void* stream) {
  switch (params.rule.score) {
    case Score::kMean:
      return launch_select_mean(params, workspace, stream);
    case Score::kSampled:
      return launch_select_sampled(params, workspace, stream);
  }
  fail("score must be one with a CUDA kernel");
}

}  // namespace pbs::cuda::sm80
