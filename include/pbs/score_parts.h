// How score_keys deals out keys. Host and device.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"
#include "pbs/tile_shape.h"

namespace pbs {

// A tile of the matrix unit: 128 queries by 128 keys.
constexpr int kScoreRows = 128;
constexpr int kScoreKeys = 128;

constexpr int score_tile_bytes(int head_dim) { return 2 * kScoreRows * head_dim; }

// Queries of as many heads in shared memory.
constexpr int score_q_stages(int head_dim) { return head_dim == 256 ? 1 : 2; }

// With the barriers of as many.
constexpr int kMaxScoreTilesPerChunk = 8;
constexpr int kScoreBarrierBytes = 256;

// For every key tile in shared memory: sums so far.
constexpr int kScoreTileTable = kScoreKeys * 4;
// For every query head of a key head: maximum and sum of each query, from either half of the CTA.
constexpr int kScoreHeadTable = 2 * kScoreRows * 8;

// The tiles of one key head go to parts, one a CTA; a part is worked on in chunks of tiles that are
// in shared memory together, and a chunk by one query head after the other.
struct ScoreParts {
  int32_t num_parts;
  int32_t tiles_per_part;   // fewer in the last
  int32_t tiles_per_chunk;  // 0 where the tables of the query heads leave no room
};

PBS_HOST_DEVICE constexpr ScoreParts score_parts(int64_t num_tiles, int64_t num_kv_heads,
                                                 int64_t heads_per_kv, int64_t num_ctas,
                                                 int head_dim) {
  const int64_t most_parts = larger(1, smaller(num_tiles, num_ctas / larger(1, num_kv_heads)));
  ScoreParts parts{};
  parts.tiles_per_part = static_cast<int32_t>(ceil_div(num_tiles, most_parts));
  parts.num_parts = static_cast<int32_t>(ceil_div(num_tiles, larger(1, parts.tiles_per_part)));
  const int64_t tile_bytes = score_tile_bytes(head_dim);
  const int64_t room = kSharedBytesPerCta - kSwizzleBytes - kScoreBarrierBytes -
                       score_q_stages(head_dim) * tile_bytes - heads_per_kv * kScoreHeadTable;
  const int64_t fitting = larger(0, room) / (tile_bytes + kScoreTileTable);
  parts.tiles_per_chunk =
      static_cast<int32_t>(smaller(parts.tiles_per_part, smaller(fitting, kMaxScoreTilesPerChunk)));
  return parts;
}

}  // namespace pbs
