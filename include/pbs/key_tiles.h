// How the keys of one query block are cut into tiles of the matrix unit's width, and in which order
// query blocks are worked on. Host and device.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"

namespace pbs {

// Tiles [0, num_own) hold original keys from own_begin on; tiles [num_own, total) hold selected
// blocks, each filled from as many blocks as fit. Only the last one may stay partly empty.
struct KeyTiles {
  int32_t num_own;
  int32_t total;
  int32_t last_size;  // keys in the last tile of selected blocks
};

PBS_HOST_DEVICE constexpr KeyTiles key_tiles(const QueryBlock& block, int64_t num_selected,
                                             int64_t kv_block_size, int64_t tile_keys) {
  KeyTiles tiles{};
  const int64_t num_keys = num_selected * kv_block_size;
  tiles.num_own = static_cast<int32_t>(ceil_div(block.own_end - block.own_begin, tile_keys));
  tiles.total = tiles.num_own + static_cast<int32_t>(ceil_div(num_keys, tile_keys));
  tiles.last_size = static_cast<int32_t>((num_keys + tile_keys - 1) % tile_keys + 1);
  return tiles;
}

// Query blocks in the order in which they are worked on. Heads go in groups whose keys and values
// fit in L2 together; inside a group the last query blocks come first, since they have most
// candidates, and the query heads of one KV head stand side by side.
struct TileOrder {
  int32_t num_q_blocks;
  int32_t num_heads;        // batch * query heads
  int32_t heads_per_group;  // divides into num_heads, but for the last group
};

struct WorkTile {
  int32_t head;  // b * num_q_heads + hq
  int32_t q_block_idx;
};

// kv_bytes: of the keys and values that one query head may visit; heads_per_kv: query heads that
// share them.
PBS_HOST_DEVICE constexpr TileOrder tile_order(int64_t num_q_blocks, int64_t num_heads,
                                               int64_t heads_per_kv, int64_t kv_bytes,
                                               int64_t l2_bytes) {
  const int64_t num_kv = larger(1, l2_bytes / larger(1, kv_bytes));
  return TileOrder{static_cast<int32_t>(num_q_blocks), static_cast<int32_t>(num_heads),
                   static_cast<int32_t>(smaller(num_heads, num_kv * heads_per_kv))};
}

PBS_HOST_DEVICE constexpr WorkTile work_tile(const TileOrder& order, int32_t tile_idx) {
  const int32_t tiles_per_group = order.heads_per_group * order.num_q_blocks;
  const int32_t first_head = tile_idx / tiles_per_group * order.heads_per_group;
  const int32_t in_group = tile_idx % tiles_per_group;
  const int32_t left = order.num_heads - first_head;
  const int32_t num_heads = left < order.heads_per_group ? left : order.heads_per_group;
  return WorkTile{first_head + in_group % num_heads, order.num_q_blocks - 1 - in_group / num_heads};
}

}  // namespace pbs
