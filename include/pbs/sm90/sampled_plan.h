// How select_blocks with score="sampled" deals out queries on CUDA, and the memory it takes. Host
// and device.
//
// A pair is a query block of a head. The pairs of the heads that share a permutation follow each
// other by query block, then by head, so that neighbours see the same keys; the sampled queries of
// some of them are stacked to the rows of one product. A CTA works on one unit after the other: as
// many stacks as it has warpgroups to multiply.
#pragma once

#include <cstdint>

#include "pbs/params.h"
#include "pbs/sm90/tile_shape.h"

namespace pbs::cuda::sm90 {

constexpr int kStackRows = 64;         // sampled queries of a stack, one warpgroup's rows
constexpr int kSampledTileKeys = 128;  // of one product
constexpr int kSumKeys = 32;           // of one sum of weights
constexpr int kSumsPerTile = kSampledTileKeys / kSumKeys;
constexpr int kDrawnUnits = 3;     // by a CTA, at once
constexpr int kSampledTables = 2;  // of sums: one is filled while the other is read
constexpr int kSelectWarps = 7;    // choose blocks; beside them one warp loads keys

constexpr int kSampledWarpgroups = 2;  // multiply

// Tiles of keys in flight, as shared memory allows.
PBS_HOST_DEVICE constexpr int sampled_key_stages(int head_dim) {
  return head_dim_tiles(head_dim).sampled_stages;
}

constexpr int64_t kGroupBytes = 32 << 20;  // of keys that are read at about the same time

struct SampledPlan {
  int32_t rows_per_pair;  // of a stack: num_samples, filled up to a power of two
  int32_t pairs_per_stack;
  int32_t heads_per_perm;
  int32_t pairs_per_perm;
  int32_t units_per_perm;
  int32_t num_perm_heads;   // of all batches
  int32_t heads_per_group;  // whose units are dealt out together
  int32_t num_ctas;
  int32_t own_tiles;        // of keys in their own order, in a unit at most
  int32_t candidate_tiles;  // of permuted keys, likewise
  int64_t mass_stride;      // floats from one row of block masses to the next
};

// A table holds one stack's sums: (own_tiles + candidate_tiles, kStackRows, kSumsPerTile) bfloat16.
PBS_HOST_DEVICE constexpr int64_t table_bytes(const SampledPlan& plan) {
  return static_cast<int64_t>(plan.own_tiles + plan.candidate_tiles) * kStackRows * kSumsPerTile *
         2;
}

constexpr SampledPlan sampled_plan(const SelectBlocksParams& params, int64_t num_sms) {
  const Problem& problem = params.problem;
  const Blocking& blocking = params.blocking;
  const int64_t num_q_blocks = num_query_blocks(problem, blocking);
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  SampledPlan plan{};
  plan.rows_per_pair = 1;
  while (plan.rows_per_pair < params.rule.num_samples) plan.rows_per_pair *= 2;
  plan.pairs_per_stack = kStackRows / plan.rows_per_pair;
  plan.heads_per_perm = narrow(heads_per_perm(problem));
  plan.pairs_per_perm = narrow(num_q_blocks * plan.heads_per_perm);
  const int64_t pairs_per_unit = kSampledWarpgroups * plan.pairs_per_stack;
  plan.units_per_perm = narrow(ceil_div(plan.pairs_per_perm, pairs_per_unit));
  plan.num_perm_heads = narrow(problem.batch * problem.num_perm_heads);
  const int64_t bytes_per_head = 2 * problem.num_kv * problem.head_dim;
  plan.heads_per_group =
      narrow(larger(1, smaller(plan.num_perm_heads, kGroupBytes / larger(1, bytes_per_head))));
  plan.num_ctas =
      narrow(smaller(num_sms, static_cast<int64_t>(plan.units_per_perm) * plan.num_perm_heads));
  // The first and the last query block of a unit may have some of their heads in others. Their own
  // segments begin less than a segment before them.
  const int64_t blocks_per_unit =
      smaller(num_q_blocks, ceil_div(pairs_per_unit - 1, plan.heads_per_perm) + 1);
  const int64_t own_keys =
      params.is_causal
          ? smaller(problem.num_kv, blocks_per_unit * blocking.block_size + blocking.segment_size)
          : problem.num_kv % blocking.segment_size;
  plan.own_tiles = counts_own_mass(params.rule) ? narrow(ceil_div(own_keys, kSampledTileKeys)) : 0;
  plan.candidate_tiles = narrow(ceil_div(problem.num_kv, kSampledTileKeys));
  plan.mass_stride = ceil_div(num_key_blocks(problem, blocking), 4) * 4;
  return plan;
}

// The workspace holds the tables of all CTAs, then their rows of block masses, then one counter.
constexpr int64_t sampled_workspace_bytes(const SampledPlan& plan) {
  return plan.num_ctas * (kSampledTables * kSampledWarpgroups * table_bytes(plan) +
                          kSelectWarps * plan.mass_stride * 4) +
         4;
}

}  // namespace pbs::cuda::sm90
