// How score_keys distributes keys and query heads on sm_90. Host and device.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"
#include "pbs/score_rows.h"
#include "pbs/sm90/tile_shape.h"

namespace pbs::cuda::sm90 {

// A product of the matrix unit: a block of 64 rows per warpgroup, by a tile of kScoreTileRows.
constexpr int kScoreBlockRows = 64;
constexpr int kScoreWarpgroups = 4;  // warpgroups that multiply

constexpr int score_tile_bytes(int head_dim) { return 2 * kScoreTileRows * head_dim; }

// The barriers of this many heads and stages of keys fit in kScoreBarrierBytes.
constexpr int kMostScoreHeads = 4;
constexpr int kMostScoreStages = 8;
constexpr int kScoreBarrierBytes = 384;

// The first pass multiplies a tile of keys by the blocks of queries, two blocks per head, and its
// warpgroups take these products in turn. This is the number of different blocks of a warpgroup,
// which keeps a state for each.
PBS_HOST_DEVICE constexpr int blocks_per_warpgroup(int num_heads) {
  return num_heads <= 2 ? 1 : num_heads == 3 ? 3 : 2;
}

// One pass over the keys of all key heads. The query heads of a key head are divided into groups,
// whose queries are in shared memory together, and its keys into parts. A CTA works on one part.
struct ScorePlan {
  int32_t heads_per_group;  // the last group may have fewer
  int32_t num_groups;
  int32_t keys_per_part;  // the last part may have fewer
  int32_t num_parts;
  int32_t num_stages;  // stages of keys in shared memory; 0 if the tables leave no room
};

// Keys that are loaded together.
constexpr int score_stage_rows(bool is_first_pass) {
  return is_first_pass ? kScoreTileRows : kScoreBlockRows;
}

// Shared memory of a CTA in addition to its stages of keys: queries and barriers, and the states of
// the blocks in the first pass or a shift for each query of all heads in the second pass.
constexpr int64_t score_fixed_bytes(bool is_first_pass, int64_t heads_per_group,
                                    int64_t heads_per_kv, int head_dim) {
  const int64_t num_groups = ceil_div(heads_per_kv, heads_per_group);
  const int64_t in_last = heads_per_kv - (num_groups - 1) * heads_per_group;
  const int64_t num_states = larger(blocks_per_warpgroup(static_cast<int>(heads_per_group)),
                                    blocks_per_warpgroup(static_cast<int>(in_last)));
  const int64_t table =
      is_first_pass ? num_states * kScoreWarpgroups * 128 * 16 : heads_per_kv * kScoreTileRows * 4;
  return kSwizzleBytes + kScoreBarrierBytes + table + heads_per_group * score_tile_bytes(head_dim);
}

constexpr int64_t score_shared_bytes(const ScorePlan& plan, bool is_first_pass,
                                     int64_t heads_per_kv, int head_dim) {
  return score_fixed_bytes(is_first_pass, plan.heads_per_group, heads_per_kv, head_dim) +
         plan.num_stages * 2 * score_stage_rows(is_first_pass) * head_dim;
}

// In the first pass, each group of a key head has its own CTA. In the second pass, one CTA sums
// over the groups.
constexpr ScorePlan score_plan(bool is_first_pass, int64_t num_keys, int64_t num_kv_heads,
                               int64_t heads_per_kv, int64_t num_sms, int head_dim) {
  const int64_t stage_rows = score_stage_rows(is_first_pass);
  const int64_t stage_bytes = 2 * stage_rows * head_dim;
  ScorePlan plan{};
  // As many heads as leave room for 256 keys.
  for (int64_t most = smaller(kMostScoreHeads, heads_per_kv); most > 0 && plan.num_stages == 0;
       --most) {
    const int64_t num_groups = ceil_div(heads_per_kv, most);
    const int64_t num_heads = ceil_div(heads_per_kv, num_groups);
    const int64_t room =
        kSharedBytesPerCta - score_fixed_bytes(is_first_pass, num_heads, heads_per_kv, head_dim);
    int64_t fitting = smaller(larger(0, room) / stage_bytes, kMostScoreStages);
    // With one head, half of the warpgroups take the even tiles, which are always in the same
    // stages.
    if (is_first_pass) fitting -= fitting % 2;
    if (fitting * stage_rows < 256 && !(most == 1 && fitting > 0)) continue;
    plan.heads_per_group = static_cast<int32_t>(num_heads);
    plan.num_groups = static_cast<int32_t>(num_groups);
    plan.num_stages = static_cast<int32_t>(fitting);
  }
  if (plan.num_stages == 0) return plan;
  // A part is a multiple of the keys that all warpgroups take at once, and costs about one more of
  // these.
  constexpr int64_t kUnit = kScoreWarpgroups * kScoreBlockRows;
  const int64_t num_walks = num_kv_heads * (is_first_pass ? plan.num_groups : 1);
  const int64_t num_units = larger(1, ceil_div(num_keys, kUnit));
  int64_t best_time = INT64_MAX;
  int64_t best = 1;
  for (int64_t waves = 1; waves <= 4; ++waves) {
    const int64_t parts = larger(1, smaller(num_units, waves * num_sms / num_walks));
    const int64_t time = ceil_div(num_walks * parts, num_sms) * (ceil_div(num_units, parts) + 1);
    if (time < best_time) {
      best_time = time;
      best = parts;
    }
  }
  plan.keys_per_part = static_cast<int32_t>(ceil_div(num_units, best) * kUnit);
  plan.num_parts = static_cast<int32_t>(ceil_div(num_keys, plan.keys_per_part));
  return plan;
}

}  // namespace pbs::cuda::sm90
