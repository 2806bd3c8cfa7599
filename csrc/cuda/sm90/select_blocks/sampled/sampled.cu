// select_blocks with score="sampled": the attention of some queries of each block to the keys that
// they may see, summed by key block, and the selection of the key blocks with the largest shares.
// Two small kernels prepare the operands: the keys in e4m3, and the sampled queries with their
// weights on their own segments. In the third kernel, one warp loads keys, warpgroups multiply and
// sum, and other warps select the blocks of the previous unit.
#include <cuda_runtime.h>
#include <cutlass/arch/reg_reconfig.h>

#include "common/elements.h"
#include "common/launch_kernel.h"
#include "device.h"
#include "key_images.cuh"
#include "mask_rows.cuh"
#include "pbs/dispatch.h"
#include "sm90/launch.h"
#include "stack_image.cuh"
#include "sums.cuh"

namespace pbs::cuda::sm90 {
namespace {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    select_blocks_sampled_kernel(const __grid_constant__ SampledArgs args) {
  extern __shared__ char raw[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(first_swizzled(raw));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      shared.k_full[stage].init(1);
      shared.k_empty[stage].init(
          4 * Traits::kStacks);  // for each stack, the warpgroup that has the tile
    }
    for (int unit = 0; unit < kDrawnUnits; ++unit) {
      shared.unit_full[unit].init(1);
      shared.unit_empty[unit].init(Traits::kThreads - 32);
    }
    for (int table = 0; table < kSampledTables; ++table) {
      shared.table_full[table].init(Traits::kConsumers);
      shared.table_empty[table].init(32 * Traits::kSelectWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const int warp = (static_cast<int>(threadIdx.x) - Traits::kConsumers) / 32;
  if (threadIdx.x < Traits::kConsumers) {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    SampledSums<Traits>(args, shared).run();
    return;
  }
  cutlass::arch::warpgroup_reg_dealloc<Traits::kOtherRegisters>();
  if (warp == 0) {
    SampledLoader<Traits>(args, shared).run();
  } else {
    SampledRowsMask<Traits>(args, shared, warp - 1).run();
  }
}

template <int kHeadDim, int kStacks>
cudaError_t launch_scores(const SampledArgs& args, cudaStream_t stream) {
  using Traits = SampledTraits<kHeadDim, kStacks>;
  return launch_kernel(select_blocks_sampled_kernel<Traits>, args, args.plan.num_ctas,
                       Traits::kThreads, Traits::kSharedBytes, stream);
}

template <class Element, int kHeadDim>
cudaError_t launch(const SampledArgs& args, cudaStream_t stream) {
  const SampledPlan& plan = args.plan;
  const int64_t num_heads = plan.num_perm_heads;
  cudaError_t error = launch_samples<StackImage<kHeadDim>, Element, kHeadDim>(args, stream);
  if (error != cudaSuccess) return error;
  if (plan.num_tiles > 0) {
    error = launch_kernel(select_blocks_key_images_kernel<Element, kHeadDim>, args,
                          num_heads * plan.num_tiles, kImageThreads<kHeadDim>, 0, stream,
                          /*starts_early=*/true);
    if (error != cudaSuccess) return error;
  }
  switch (plan.stacks_per_unit) {
    case kFewestStacks:
      return launch_scores<kHeadDim, kFewestStacks>(args, stream);
    case kFewStacks:
      return launch_scores<kHeadDim, kFewStacks>(args, stream);
    case kManyStacks:
      return launch_scores<kHeadDim, kManyStacks>(args, stream);
  }
  return cudaErrorInvalidValue;
}

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
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = dispatch_half(params.problem.dtype, [&](auto element) {
    return dispatch_head_dim(params.problem.head_dim, [&](auto head_dim) {
      return launch<decltype(element), head_dim>(args, cuda_stream);
    });
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda::sm90
