// Types, tile sizes and shared memory of the sm_80 attend kernel.
#pragma once

#include <cute/tensor.hpp>

#include "common/attend/draw.cuh"
#include "pbs/sm80/tile_shape.h"
#include "sm80/tile_copy.cuh"

namespace pbs::cuda::sm80 {

// How far a warp is in the mask of a query block, and where the tile is that it copies.
struct MaskWalk {
  uint32_t words[32];  // of the mask
  uint32_t bits;       // of the word in work, those still to come
  uint32_t filled;     // which of the words have bits, and are still to come
  int word;            // in work
  int next_row;        // of the selected block in work
  int rows[2];         // the first row of each part of the tile
};

template <class Element_, int kHeadDim_, int kKeys_>
struct AttendTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kParts = kKeys / kPartRows;
  static_assert(kParts <= 2);
  static constexpr int kWarps = attend_warps(kHeadDim);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kTileRows / (16 * kWarps);  // of a warp, 16 rows each
  static constexpr int kCtasPerSm = kHeadDim <= 128 ? 2 : 1;
  using Work = AttendWork<Element>;

  // Accumulators of a row tile.
  using Scores = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<kKeys / 2>>{}));
  using Output = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<kHeadDim / 2>>{}));

  using QueryCopy = TileCopy<kHeadDim, kTileRows, kThreads>;
  using KeyCopy = TileCopy<kHeadDim, kKeys, kThreads>;
  using QueryRead = TileRead<kHeadDim, kTileRows>;
  using KeyRead = TileRead<kHeadDim, kKeys>;

  struct Shared {
    alignas(128) Element q[kTileRows * kHeadDim];
    alignas(128) Element k[kKeys * kHeadDim];
    alignas(128) Element v[kKeys * kHeadDim];
    Work work[2];  // one is drawn while the other is in work
    MaskWalk walks[kWarps];
  };
  static_assert(offsetof(Shared, work) == tile_bytes(kHeadDim, kKeys));
  static_assert(kKeys > tile_keys(kHeadDim, false) || sizeof(Shared) <= kSmallSharedBytesPerCta);
};

}  // namespace pbs::cuda::sm80
