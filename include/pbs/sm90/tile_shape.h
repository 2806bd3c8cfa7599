// Shapes of the tiles that the sm_90a attend kernel holds in shared memory, and their sizes. Host
// and device.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"
#include "pbs/key_tiles.h"

namespace pbs::cuda::sm90 {

// Rows of a query block's tile: 64 for each of two consumer warpgroups.
constexpr int kTileRows = 128;

// The contents of shared memory, for the kernels of one head dim.
struct HeadDimTiles {
  // Keys of one tile of attend. Two stages of K and V must fit beside Q, and the accumulators of
  // one warpgroup limit the width.
  int keys;
  // A second buffer of Q hides its load behind the last products of the previous block.
  int q_stages;
  // Tiles of K and of V that are loaded ahead, as shared memory allows. V is freed later than K,
  // after the softmax of the next tile, so it needs the third stage: with three stages of K and two
  // of V, D=128 loses a fifth of its speed.
  int k_stages;
  int v_stages;
  int mean_columns;    // columns of a query block that mean scores load together
  int sampled_stages;  // tiles of keys that sampled scores load ahead
};

// Zeros for a head dim without kernels. No kernel compiles with them.
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

// Query blocks that are drawn ahead, including the current one.
constexpr int kDrawnBlocks = 3;

// Bytes of all tiles with 2-byte elements. The limit for one CTA, below, includes the barriers.
constexpr int tile_bytes(int head_dim) {
  return 2 * head_dim *
         (q_stages(head_dim) * kTileRows +
          (k_stages(head_dim) + v_stages(head_dim)) * tile_keys(head_dim));
}
constexpr int kSharedBytesPerCta = 227 * 1024;

// Swizzled tiles repeat after this many bytes and must start at a multiple of it.
constexpr int kSwizzleBytes = 1024;

}  // namespace pbs::cuda::sm90
