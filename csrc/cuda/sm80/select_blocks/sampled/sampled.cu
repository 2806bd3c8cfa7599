// select_blocks with score="sampled": the attention of some queries of each block to the keys that
// they may see, summed by key block, and the selection of the key blocks with the largest shares.
#include <cuda_runtime.h>

#include "common/elements.h"
#include "common/select_blocks/sampled/units.cuh"
#include "device.h"
#include "instances.h"
#include "pbs/dispatch.h"
#include "pbs/sm80/sampled_tiles.h"
#include "sm80/launch.h"

namespace pbs::cuda::sm80 {
namespace {

SampledPlan plan_of(const SelectBlocksParams& params) {
  return sampled_plan(params, sms_of_workspace());
}

}  // namespace

int64_t select_sampled_workspace(const SelectBlocksParams& params) {
  return sampled_workspace(plan_of(params)).end;
}

const char* launch_select_sampled(const SelectBlocksParams& params, void* workspace, void* stream) {
  const SampledPlan plan = plan_of(params);
  const SampledArgs args = sampled_args(params, plan, sampled_workspace(plan), workspace);
  if (plan.num_ctas == 0) return nullptr;
  if (exceeds_grid(plan)) return "too many query blocks for one grid";
  const cudaError_t error = dispatch_half(params.problem.dtype, [&](auto element) {
    return dispatch_head_dim(params.problem.head_dim, [&](auto head_dim) {
      return run_sampled<decltype(element), head_dim>(args, static_cast<cudaStream_t>(stream));
    });
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda::sm80
