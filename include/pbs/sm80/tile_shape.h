// Shapes of the tiles that the sm_80 attend kernel holds in shared memory. Host and device.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"

namespace pbs::cuda::sm80 {

// Rows of a query block's tile.
constexpr int kTileRows = 128;
// Keys that are loaded together. They never cross the border of a block or a page.
constexpr int kPartRows = 32;

// Multiprocessors of 8.6, 8.9 and 12.0 have 100 KB of shared memory, those of other GPUs at least
// 164 KB. One CTA may use all but 1 KB.
constexpr int64_t kLargeSharedBytes = 164 * 1024;
constexpr int64_t kSmallSharedBytes = 100 * 1024;
constexpr int64_t kReservedBytesPerCta = 1024;
constexpr int kSmallSharedBytesPerCta = kSmallSharedBytes - kReservedBytesPerCta;

// Keys of a tile. A warp has 32 query rows (16 with 256 columns), so the accumulators of more than
// 64 keys do not fit in its registers beside the output. If shared memory is small, tiles are
// halved: for 128 columns to fit two CTAs on a multiprocessor, for 256 columns to fit one.
PBS_HOST_DEVICE constexpr int tile_keys(int head_dim, bool has_large_shared) {
  return head_dim < 128 || has_large_shared ? 64 : 32;
}

constexpr int kMostParts = 2;  // parts of a tile

PBS_HOST_DEVICE constexpr int attend_ctas_per_sm(int head_dim) { return head_dim <= 128 ? 2 : 1; }

PBS_HOST_DEVICE constexpr int attend_warps(int head_dim) { return head_dim <= 128 ? 4 : 8; }

// Bytes of Q, K and V with 2-byte elements.
PBS_HOST_DEVICE constexpr int tile_bytes(int head_dim, int keys) {
  return 2 * head_dim * (kTileRows + 2 * keys);
}

}  // namespace pbs::cuda::sm80
