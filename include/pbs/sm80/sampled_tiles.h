// Tiles of sampled scores on sm_80: keys are in shared memory in their own dtype. Host and device.
#pragma once

#include <cstdint>

#include "pbs/sampled_plan.h"
#include "pbs/sm80/tile_shape.h"

namespace pbs::cuda::sm80 {

constexpr int kSampledWarps = 4;
// Keys that are loaded together.
constexpr int kStageKeys = 64;

// A warp holds its sampled queries in registers: 64 rows of up to 128 columns, or 32 of 256.
PBS_HOST_DEVICE constexpr int most_stacks(int head_dim) {
  return head_dim <= 128 ? kManyStacks : kFewStacks;
}

// CTAs per multiprocessor, and stages of keys that each loads ahead: together they fit in 99 KB.
PBS_HOST_DEVICE constexpr int sampled_ctas_per_sm(int head_dim) { return head_dim <= 128 ? 2 : 1; }
PBS_HOST_DEVICE constexpr int sampled_stages(int head_dim) { return head_dim <= 128 ? 3 : 2; }

PBS_HOST_DEVICE constexpr int stage_bytes(int head_dim) { return 2 * kStageKeys * head_dim; }

constexpr SampledPlan sampled_plan(const SelectBlocksParams& params, int64_t num_sms) {
  const auto head_dim = static_cast<int>(params.problem.head_dim);
  return sampled_plan(params,
                      SampledMachine{num_sms, sampled_ctas_per_sm(head_dim), most_stacks(head_dim),
                                     /*tile_bytes=*/2 * kSampledKeys * head_dim});
}

constexpr SampledWorkspace sampled_workspace(const SampledPlan& plan) {
  return sampled_workspace(plan, /*key_tile_bytes=*/0, /*stack_bytes=*/0, /*tables_per_cta=*/1);
}

}  // namespace pbs::cuda::sm80
