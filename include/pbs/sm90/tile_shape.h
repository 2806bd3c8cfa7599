// Shapes of the tiles that the sm_90a attend kernel holds in shared memory, and how much of it they
// take. Host and device.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"
#include "pbs/key_tiles.h"

namespace pbs::cuda::sm90 {

// Rows of a query block's tile: 64 for each of two consumer warpgroups.
constexpr int kTileRows = 128;

// What the kernels of one head dim hold in shared memory at once.
struct HeadDimTiles {
  // Keys of one tile of attend: what two stages of K and V beside Q leave room for, and no wider
  // than the accumulators of one warpgroup allow.
  int keys;
  // A second Q hides its load behind the previous block's last products.
  int q_stages;
  // Tiles of K and of V in flight, as shared memory allows. V is freed later than K, after the
  // softmax of the next tile, and needs the third one: with three of K and two of V, D=128 loses a
  // fifth of its speed.
  int k_stages;
  int v_stages;
  int mean_columns;    // of a query block that mean scores load together
  int sampled_stages;  // tiles of keys that sampled scores have in flight
};

// All zeros for a head dim without kernels, which no kernel compiles with.
PBS_HOST_DEVICE constexpr HeadDimTiles head_dim_tiles(int head_dim) {
  switch (head_dim) {
    case 64:
      return {128, 2, 4, 4, 64, 8};
    case 96:
      return {128, 2, 3, 3, 96, 8};
    case 128:
      return {128, 2, 2, 3, 128, 8};
    case 256:
      return {64, 1, 2, 3, 128, 4};
  }
  return {};
}

constexpr int tile_keys(int head_dim) { return head_dim_tiles(head_dim).keys; }
constexpr int q_stages(int head_dim) { return head_dim_tiles(head_dim).q_stages; }
constexpr int k_stages(int head_dim) { return head_dim_tiles(head_dim).k_stages; }
constexpr int v_stages(int head_dim) { return head_dim_tiles(head_dim).v_stages; }

// Query blocks drawn ahead, the one in work among them.
constexpr int kDrawnBlocks = 3;

// All tiles together take this much with 2-byte elements. The limit of what one CTA may take,
// below, includes the barriers.
constexpr int tile_bytes(int head_dim) {
  return 2 * head_dim *
         (q_stages(head_dim) * kTileRows +
          (k_stages(head_dim) + v_stages(head_dim)) * tile_keys(head_dim));
}
constexpr int kSharedBytesPerCta = 227 * 1024;

// Swizzled tiles repeat every so many bytes and have to start at a multiple of it.
constexpr int kSwizzleBytes = 1024;

}  // namespace pbs::cuda::sm90
