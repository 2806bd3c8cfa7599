// Operands of sampled scores on sm_90a: elements of one byte. Host and device.
#pragma once

#include <cstdint>

#include "pbs/sampled_plan.h"
#include "pbs/sm90/tile_shape.h"

namespace pbs::cuda::sm90 {

constexpr int kDrawnUnits = 3;     // drawn units that a CTA holds at once
constexpr int kSampledTables = 2;  // tables of sums: one is written while the other is read
constexpr int kSumWarpgroups = 4;  // warpgroups that multiply

// Tiles of keys that are loaded ahead.
PBS_HOST_DEVICE constexpr int sampled_key_stages(int head_dim) {
  return head_dim_tiles(head_dim).sampled_stages;
}

// A tile in device memory is a copy of its layout in shared memory: its one-byte elements,
// swizzled, followed by their scale as a float. Bulk copies move at least 16 bytes.
PBS_HOST_DEVICE constexpr int key_tile_bytes(int head_dim) { return kSampledKeys * head_dim + 16; }
PBS_HOST_DEVICE constexpr int stack_bytes(int head_dim) { return kStackRows * head_dim; }

constexpr SampledPlan sampled_plan(const SelectBlocksParams& params, int64_t num_sms) {
  const auto head_dim = static_cast<int>(params.problem.head_dim);
  return sampled_plan(
      params, SampledMachine{num_sms, /*ctas_per_sm=*/1, kManyStacks, key_tile_bytes(head_dim)});
}

constexpr SampledWorkspace sampled_workspace(const SampledPlan& plan) {
  return sampled_workspace(plan, key_tile_bytes(plan.head_dim), stack_bytes(plan.head_dim),
                           kSampledTables);
}

}  // namespace pbs::cuda::sm90
