// select_blocks with score="sampled": the attention of some queries of each block to every
// key they may see, summed by key block, and the blocks that matter most to any of them, in one
// kernel. A warp loads keys, warpgroups multiply and sum, other warps choose blocks of the unit
// before.
#include <cuda_runtime.h>
#include <cutlass/arch/reg_reconfig.h>

#include <limits>

#include "common/elements.h"
#include "common/launch_kernel.h"
#include "device.h"
#include "mask_rows.cuh"
#include "pbs/dispatch.h"
#include "sm90/launch.h"
#include "sm90/tma.h"

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
      shared.k_empty[stage].init(Traits::kConsumers / 32);
    }
    for (int unit = 0; unit < kDrawnUnits; ++unit) {
      shared.unit_full[unit].init(1);
      shared.unit_empty[unit].init(Traits::kThreads - 32);
    }
    for (int table = 0; table < kSampledTables; ++table) {
      shared.table_full[table].init(Traits::kConsumers);
      shared.table_empty[table].init(32 * kSelectWarps);
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

template <class Element, int kHeadDim>
cudaError_t launch(const SampledArgs& args, cudaStream_t stream) {
  using Traits = SampledTraits<Element, kHeadDim>;
  return launch_kernel(select_blocks_sampled_kernel<Traits>, args, args.plan.num_ctas,
                       Traits::kThreads, Traits::kSharedBytes, stream);
}

SampledPlan plan_of(const SelectBlocksParams& params) {
  int num_sms = 0;
  if (count_sms(&num_sms) != nullptr) num_sms = 1;  // the launch will say why
  return sampled_plan(params, num_sms);
}

}  // namespace

int64_t select_sampled_workspace(const SelectBlocksParams& params) {
  return sampled_workspace_bytes(plan_of(params));
}

const char* launch_select_sampled(const SelectBlocksParams& params, void* workspace, void* stream) {
  const Problem& problem = params.problem;
  SampledArgs args{};
  args.params = params;
  args.plan = plan_of(params);
  args.num_q_blocks = static_cast<int>(num_query_blocks(problem, params.blocking));
  args.num_words = static_cast<int>(num_mask_words(num_key_blocks(problem, params.blocking)));
  if (args.plan.num_ctas == 0) return nullptr;
  if (static_cast<int64_t>(args.plan.units_per_perm) * args.plan.num_perm_heads >
      std::numeric_limits<int32_t>::max()) {
    return "too many query blocks for one grid";
  }
  const int64_t num_tables =
      static_cast<int64_t>(args.plan.num_ctas) * kSampledTables * kSampledWarpgroups;
  args.tables = static_cast<char*>(workspace);
  args.masses = reinterpret_cast<float*>(args.tables + num_tables * table_bytes(args.plan));
  args.counter = reinterpret_cast<int*>(args.masses + static_cast<int64_t>(args.plan.num_ctas) *
                                                          kSelectWarps * args.plan.mass_stride);
  if (const char* error = encode_rows(&args.k, params.k, problem, problem.num_kv_heads,
                                      problem.num_kv, kSampledTileKeys, problem.head_dim)) {
    return error;
  }
  if (const char* error = encode_rows(&args.k_perm, params.k_perm, problem, problem.num_perm_heads,
                                      problem.num_kv, kSampledTileKeys, problem.head_dim)) {
    return error;
  }
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemsetAsync(args.counter, 0, sizeof(int), cuda_stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = dispatch_half(problem.dtype, [&](auto element) {
    return dispatch_head_dim(problem.head_dim, [&](auto head_dim) {
      return launch<decltype(element), head_dim>(args, cuda_stream);
    });
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pbs::cuda::sm90
