// How score_keys distributes keys on sm_80, and its shared memory. Host and device.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"
#include "pbs/score_rows.h"
#include "pbs/sm80/tile_shape.h"

namespace pbs::cuda::sm80 {

// A CTA holds a block of rows in registers, 32 per warp, and multiplies it by rows that stream
// through shared memory. In the first pass the block has queries and keys stream, in the second
// pass the block has keys and queries stream.
constexpr int kScoreWarps = 4;
constexpr int kScoreThreads = 32 * kScoreWarps;
constexpr int kScoreBlockRows = 32 * kScoreWarps;
static_assert(kScoreBlockRows == kScoreTileRows, "a block holds the queries of a head");

constexpr int kScoreCtasPerSm = 2;
// Shared memory of a CTA, on the GPUs with the least.
constexpr int kScoreSharedBytes = kSmallSharedBytes / kScoreCtasPerSm - kReservedBytesPerCta;

// Rows that are loaded together, each with a shift of 4 bytes, and the number of stages for them.
constexpr int score_stage_rows(int head_dim) { return head_dim <= 128 ? 64 : 32; }
constexpr int score_stage_bytes(int head_dim) {
  return score_stage_rows(head_dim) * (2 * head_dim + 4);
}
constexpr int score_stages(int head_dim) { return kScoreSharedBytes / score_stage_bytes(head_dim); }
constexpr int score_shared_bytes(int head_dim) {
  return score_stages(head_dim) * score_stage_bytes(head_dim);
}

// The most keys of a part: the end of a block after its last key must fit in 32 bits.
constexpr int64_t kMostPartKeys = int64_t{1} << 30;

// Divides the keys that each of num_walks CTAs would read into parts with a CTA each.
struct ScoreParts {
  int32_t keys_per_part;  // the last part may have fewer
  int32_t num_parts;
};

// Each part costs about as much as kScoreBlockRows additional keys.
constexpr ScoreParts score_parts(int64_t num_keys, int64_t num_walks, int64_t num_sms) {
  const int64_t num_slots = kScoreCtasPerSm * num_sms;
  const int64_t num_blocks = larger(1, ceil_div(num_keys, kScoreBlockRows));
  int64_t best_time = INT64_MAX;
  int64_t best = 1;
  for (int64_t waves = 1; waves <= 4; ++waves) {
    const int64_t parts = larger(1, smaller(num_blocks, waves * num_slots / larger(1, num_walks)));
    const int64_t time = ceil_div(num_walks * parts, num_slots) * (ceil_div(num_blocks, parts) + 1);
    if (time < best_time) {
      best_time = time;
      best = parts;
    }
  }
  const int64_t keys_per_part =
      smaller(kMostPartKeys, ceil_div(num_blocks, best) * kScoreBlockRows);
  return ScoreParts{static_cast<int32_t>(keys_per_part),
                    static_cast<int32_t>(ceil_div(num_keys, keys_per_part))};
}

}  // namespace pbs::cuda::sm80
