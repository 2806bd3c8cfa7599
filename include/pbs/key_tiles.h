// Cuts the keys of one query block into tiles of the width of the matrix unit. Host and device.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"

namespace pbs {

// A tile in shared memory is a row of column groups, each as wide as the swizzle span of 128 (or,
// for 96 columns, 64) bytes.
constexpr int group_columns(int head_dim) { return head_dim % 64 == 0 ? 64 : 32; }

// Tiles [0, num_own) hold original keys, from the last visible ones back to own_begin, so that the
// triangle of the causal mask comes first. Tiles [num_own, total) hold selected blocks, as many as
// fit in a tile. The first of them holds the remainder. Every row sees all keys of tiles
// [num_masked, total).
struct KeyTiles {
  int32_t num_own;
  int32_t total;
  int32_t num_masked;
  int32_t first_selected_size;  // keys in tile num_own
  int32_t own_size;             // original keys
  int32_t first_row_sees;  // original keys that the first row sees; each later row sees one more
};

PBS_HOST_DEVICE constexpr KeyTiles key_tiles(const QueryBlock& block, int64_t num_selected,
                                             int64_t kv_block_size, int64_t tile_keys,
                                             bool is_causal) {
  KeyTiles tiles{};
  const int64_t num_keys = num_selected * kv_block_size;
  const int64_t own_size = block.own_end - block.own_begin;
  const int64_t first_row_sees = is_causal ? block.first_position - block.own_begin + 1 : own_size;
  tiles.num_own = static_cast<int32_t>(ceil_div(own_size, tile_keys));
  tiles.total = tiles.num_own + static_cast<int32_t>(ceil_div(num_keys, tile_keys));
  tiles.first_selected_size = static_cast<int32_t>((num_keys + tile_keys - 1) % tile_keys + 1);
  tiles.num_masked = num_keys % tile_keys == 0
                         ? tiles.num_own - static_cast<int32_t>(first_row_sees / tile_keys)
                         : tiles.num_own + 1;
  tiles.own_size = static_cast<int32_t>(own_size);
  tiles.first_row_sees = static_cast<int32_t>(first_row_sees);
  return tiles;
}

// The first of the original keys in tile `tile_idx` < num_own, counted from own_begin.
PBS_HOST_DEVICE constexpr int32_t own_tile_begin(const KeyTiles& tiles, int32_t tile_idx,
                                                 int32_t tile_keys) {
  return (tiles.num_own - 1 - tile_idx) * tile_keys;
}

// How many keys of a tile a row of the block sees, from the left: none if not positive, all if at
// least tile_keys.
PBS_HOST_DEVICE constexpr int32_t visible_keys(const KeyTiles& tiles, int32_t tile_idx, int32_t row,
                                               int32_t tile_keys) {
  if (tile_idx > tiles.num_own) return tile_keys;
  if (tile_idx == tiles.num_own) return tiles.first_selected_size;
  const int32_t sees = tiles.first_row_sees + row;
  return (sees < tiles.own_size ? sees : tiles.own_size) -
         own_tile_begin(tiles, tile_idx, tile_keys);
}

// Gathers the rows of selected blocks in chunks of at most a tile, until a tile is full. rows[0]
// has the chunk added last. Unused places of the first tile have rows before the first, which TMA
// reads as zeros.
template <int kMaxChunks>
struct TilePacker {
  int32_t chunks_left;  // missing in the current tile
  int32_t rows[kMaxChunks] = {};

  PBS_HOST_DEVICE constexpr void begin(int32_t first_chunks, int32_t chunk_rows) {
    chunks_left = first_chunks;
    for (int i = 0; i < kMaxChunks; ++i) rows[i] = -chunk_rows;
  }

  // Returns whether the tile is full. The next tile then takes chunks_per_tile.
  PBS_HOST_DEVICE constexpr bool add(int32_t row, int32_t chunks_per_tile) {
    for (int i = kMaxChunks - 1; i > 0; --i) rows[i] = rows[i - 1];
    rows[0] = row;
    if (--chunks_left != 0) return false;
    chunks_left = chunks_per_tile;
    return true;
  }
};

}  // namespace pbs
